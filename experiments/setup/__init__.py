"""What a run starts from: data, model, clients, and the room for them."""
