"""Starting a child process that needs the stack's libraries, on the host or in the container. What it is like inside is ``launcher.serve``.

A child gets the path of a request (JSON) and answers on its stdout, one JSON object a line: ``progress`` any number of times, then
``result`` or ``error`` once. Its stderr, where the libraries talk, goes to a log.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher import errors
from launcher.caches import NARROWER, cache_environment
from launcher.errors import ActionError, Finding, FtlaunchError, MissingError
from launcher.files import write_json
from launcher.plan import Container
from launcher.serve import TOKENS, Say

PACKAGE = Path(__file__).resolve().parent.parent
IN_IMAGE = "/opt/ftlaunch"
"""Where the package is bound in the container."""

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@dataclass(frozen=True)
class Where:
    """How staging's processes are started."""

    container: Container
    python: str
    """The interpreter, when there is no container."""
    environ: Mapping[str, str]
    data: Path
    say: Say

    def run(
        self, module: str, request: Mapping[str, Any], *, scratch: Path, log: Path, reads: Sequence[Path] = (), doing: str = "staging"
    ) -> dict[str, Any]:
        """Run ``launcher.<module>`` on a request and give its result.

        ``reads``: what it needs to see beside the data folder. ``doing``: what is said to have failed.
        Errors: those of the child; ActionError when it died without a word, MissingError when it could not be started.
        """
        scratch.mkdir(parents=True, exist_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        request_file = scratch / "request.json"
        write_json(request_file, request)
        argv, environ = self._command(module, request_file, scratch, reads)
        try:
            with open(log, "wb") as stderr:
                process = subprocess.Popen(argv, env=environ, cwd=scratch, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr)
        except OSError as error:
            raise MissingError(f"{argv[0]} cannot be started: {error.strerror}", code="no-interpreter") from error
        return self._listen(process, log, doing)

    def _command(self, module: str, request: Path, scratch: Path, reads: Sequence[Path]) -> tuple[list[str], dict[str, str]]:
        own = {
            "PYTHONNOUSERSITE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            **cache_environment(scratch),
            "HF_DATASETS_TRUST_REMOTE_CODE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "TOKENIZERS_PARALLELISM": "true",
        }
        environ = {name: value for name, value in self.environ.items() if not name.startswith("PYTHON") and name not in NARROWER}
        if module != "stage.fetch":
            own.update(OFFLINE)
            environ = {name: value for name, value in environ.items() if name not in TOKENS}
        else:
            token = next((environ[name] for name in TOKENS if environ.get(name)), None)
            environ.update({"HF_TOKEN": token} if token else {})
            own.update({"HF_ENDPOINT": environ["HF_ENDPOINT"]} if "HF_ENDPOINT" in environ else {})
        arguments = ["-m", f"launcher.{module}", str(request)]
        if self.container.use == "none":
            code = scratch / "code"  # a folder with this package only: the site-packages around it may belong to another environment
            code.mkdir(exist_ok=True)
            if not (code / "launcher").is_symlink():
                (code / "launcher").symlink_to(PACKAGE)
            return [self.python, *arguments], {**environ, **own, "PYTHONPATH": str(code)}

        from launcher.image.enter import bind, clean_environment, enter

        assert self.container.image is not None, "apptainer needs an image"
        own["PYTHONPATH"] = IN_IMAGE
        binds = [bind(str(self.data)), bind(str(PACKAGE), f"{IN_IMAGE}/launcher", read_only=True)]
        binds += [bind(str(path), read_only=True) for path in reads]
        argv = enter(self.container, self.container.image, ["python3", *arguments], binds=binds, env=own, cwd=str(scratch))
        return argv, clean_environment(environ)

    def _listen(self, process: subprocess.Popen[bytes], log: Path, doing: str) -> dict[str, Any]:
        answer: dict[str, Any] = {}
        try:
            assert process.stdout is not None and process.stdin is not None
            for line in process.stdout:
                try:
                    message = json.loads(line)
                except ValueError:
                    continue
                if "progress" in message:
                    self.say(message["progress"])
                else:
                    answer = message
            code = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        if "error" in answer:
            raise _error_from(answer["error"], log)
        if "result" in answer:
            result = answer["result"]
            assert isinstance(result, dict)
            return result
        how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
        hint = "signal 9 usually means that memory ran out" if code in (-9, 137) else _last_line(log)
        raise ActionError(f"{doing} {how} without an answer", file=str(log), hint=hint or None)


def _error_from(message: Mapping[str, Any], log: Path) -> FtlaunchError:
    findings = [Finding(**finding) for finding in message["findings"]]
    if message["class"] == "ActionError" and findings[0].file is None and findings[0].hint is None:
        findings[0] = replace(findings[0], file=str(log), hint="this log says more")
    error: FtlaunchError = getattr(errors, message["class"])(findings=findings)
    return error


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:500] if lines else ""
