"""Creates and submits a toy run on the test cluster, as its user: ``python toy_submit.py RUNS '{"plan": {…}, "toy": {…}}'``.

With ``"train": true`` the ranks are the real ones, as far as they come without torch. Prints one JSON line: the run folder and the job id,
or the error and its exit code.
"""

import json
import sys
from pathlib import Path

from toy import toy_plan, toy_run

from launcher.errors import FtlaunchError
from launcher.plan import Container, Staged
from launcher.render import render
from launcher.runs import create_run
from launcher.submit import submit

wanted = json.loads(sys.argv[2])
site = {"name": "test", "scheduler": "slurm", "network": {"ifname": "lo"}, **wanted["plan"].pop("site", {})}
if "container" in wanted["plan"]:
    wanted["plan"]["container"] = Container(**wanted["plan"]["container"])
try:
    runs = Path(sys.argv[1])
    if wanted.get("train"):
        for name in ("model", "train", "eval"):
            (runs / name).mkdir(parents=True, exist_ok=True)
        changes = {"preset": {"parallelism": "ddp"}, "staged": Staged(str(runs / "model"), str(runs), 2, 2, 2, "sha")}
        plan = toy_plan(site=site, **changes, **wanted["plan"])
        run = create_run(plan, lambda run: render(plan, run, python=sys.executable), "name: toy\n", runs, new=True)
    else:
        run = toy_run(runs, toy_plan(site=site, **wanted["plan"]), python=sys.executable, new=True, **wanted["toy"])
    answer = {"run": str(run.root), "job_id": submit(run)}
except FtlaunchError as error:
    answer = {"error": str(error), "exit_code": error.exit_code}
sys.stdout.write(json.dumps(answer) + "\n")
