"""Creates and submits a toy run on the test cluster, as its user: ``python toy_submit.py RUNS '{"plan": {…}, "toy": {…}}'``.

Prints one JSON line: the run folder and the job id, or the error and its exit code.
"""

import json
import sys
from pathlib import Path

from toy import toy_plan, toy_run

from launcher.errors import FtlaunchError
from launcher.submit import submit

wanted = json.loads(sys.argv[2])
site = {"name": "test", "scheduler": "slurm", "network": {"ifname": "lo"}, **wanted["plan"].pop("site", {})}
try:
    run = toy_run(Path(sys.argv[1]), toy_plan(site=site, **wanted["plan"]), python=sys.executable, new=True, **wanted["toy"])
    answer = {"run": str(run.root), "job_id": submit(run)}
except FtlaunchError as error:
    answer = {"error": str(error), "exit_code": error.exit_code}
sys.stdout.write(json.dumps(answer) + "\n")
