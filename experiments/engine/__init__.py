"""What runs: methods by name, compiled programs, evaluation, how much at once, what it will take."""
