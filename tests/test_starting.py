"""By whichever name the command line is started it works, or says in one line what is missing."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fedlora_jax
from experiments.engine import process

ROOT = Path(__file__).parents[1]
SCRIPT = """#!{python}
import sys
from fedlora_jax.__main__ import main
if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.fixture
def script(tmp_path):
    """What pip makes of ``[project.scripts]``."""
    path = tmp_path / "bin" / "fedlora"
    path.parent.mkdir()
    path.write_text(SCRIPT.format(python=sys.executable))
    path.chmod(0o755)
    return path


def call(*command, path=ROOT, cwd=None, **options):
    env = os.environ | {"PYTHONPATH": str(path), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        list(map(str, command)), env=env, cwd=cwd, capture_output=True, text=True, timeout=200, **options
    )


def one_line(done):
    """An error of one line and exit code 2."""
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize("module", ["experiments", "fedlora_jax"])
def test_the_version_by_module(module):
    done = call(sys.executable, "-m", module, "--version", cwd=ROOT)
    assert done.stdout == f"fedlora-jax {fedlora_jax.__version__}\n"


@pytest.mark.long
def test_the_console_script_is_the_command_line_from_any_folder(script, tmp_path):
    (tmp_path / "experiments").mkdir()  # of the user's, as there are many
    (tmp_path / "experiments" / "__init__.py").touch()
    version = call(script, "--version", cwd=tmp_path)
    assert (version.returncode, version.stdout) == (0, f"fedlora-jax {fedlora_jax.__version__}\n")
    assert "(see fedlora run --help)" in one_line(call(script, "run", cwd=tmp_path))


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks at /proc")
def test_the_console_script_starts_again_with_its_settings_and_stops_at_a_signal(script, tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    env.pop("GLIBC_TUNABLES", None)
    child = subprocess.Popen(
        [script, "run", "--method", "fedit"], env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    here, end = Path(f"/proc/{child.pid}"), time.time() + 100
    settled = lambda: b"GLIBC_TUNABLES" in (here / "environ").read_bytes() or process.accelerated()
    while time.time() < end and not (settled() and _catches(here, signal.SIGTERM)):
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM
    assert errors.endswith("stopped by SIGTERM; to go on: fedlora run --method fedit\n")


def _catches(here: Path, number: int) -> bool:
    (line,) = [line for line in (here / "status").read_text().splitlines() if line.startswith("SigCgt")]
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.long
def test_the_library_alone_says_that_it_has_no_command_line(tmp_path):
    """As the wheel installs it."""
    shutil.copytree(ROOT / "fedlora_jax", tmp_path / "site" / "fedlora_jax")
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "__main__.py").write_text("raise SystemExit('of somebody else')")
    alone = lambda *options: call(sys.executable, "-m", "fedlora_jax", *options, path=tmp_path / "site", cwd=tmp_path)
    assert "runs from a clone" in one_line(alone("compare"))
    assert alone("--version").stdout == f"fedlora-jax {fedlora_jax.__version__}\n"


@pytest.mark.parametrize("module", ["tqdm", "matplotlib", "jax"])
def test_what_the_command_line_lacks_is_named_with_how_to_install_it(module):
    code = f"import sys; sys.modules[{module!r}] = None; from experiments import __main__; __main__.run()"
    error = one_line(call(sys.executable, "-c", code, "compare", cwd=ROOT))
    assert module in error
    assert f"pip install -e '{ROOT}[experiments]'" in error
