"""A shell completes commands, options, methods and wrappers, with what ``completion`` prints."""

import shutil
import subprocess
from importlib.util import find_spec

import pytest

from experiments.start import planned

TRY = """source {script}
compopt() {{ :; }}
COMP_WORDS=({words}); COMP_CWORD=$(({count} - 1)); _shtab_fedlora; printf '%s\\n' "${{COMPREPLY[@]}}" """


def printed(shell, capsys):
    from experiments.requests import Completion

    planned("completion", Completion(shell))[1]()
    return capsys.readouterr().out


@pytest.mark.skipif(find_spec("shtab") is None or shutil.which("bash") is None, reason="shtab or bash is not there")
@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("fedlora compare-", {"compare-runs"}),
        ("fedlora compare --meth", {"--methods"}),
        ("fedlora run --meth", {"--method"}),
        ("fedlora compare --methods fedit,hyp", {"fedit,hyperlora"}),
        ("fedlora compare --methods fedit+prox", {"fedit+proximal"}),
        ("fedlora compare --help opt", {"optimizer"}),
        ("fedlora compare --resume --optimizer ada", {"adam", "adamw"}),
        ("fedlora bench rou", {"round"}),
    ],
)
def test_bash_completes(typed, found, tmp_path, capsys):
    script = tmp_path / "fedlora"
    script.write_text(printed("bash", capsys))
    text = TRY.format(script=script, words=typed, count=len(typed.split()))
    said = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True).stdout
    assert set(said.split()) == found


@pytest.mark.skipif(find_spec("shtab") is None, reason="shtab is not there")
@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_told_the_same_names(shell, capsys):
    text = printed(shell, capsys)
    assert all(name in text for name in ("compare-runs", "hyperlora", "adamw"))


@pytest.mark.skipif(find_spec("shtab") is not None, reason="shtab is there")
def test_without_shtab_it_says_what_to_install(capsys):
    with pytest.raises(ValueError, match="pip install 'fedlora-jax\\[completion\\]'"):
        printed("bash", capsys)
