"""``make deploy-check``: every check of what is deployed, with what it found; exit 1 when that is anything."""

from __future__ import annotations

import sys

from tests.deploy import crosscheck, dockerfiles, hardening, locks, monitoring, rules, schema
from tests.deploy.sources import Deployment, RenderError, renderer

CHECKS = {
    "Dockerfiles (hadolint)": dockerfiles.findings,
    "schemas (Kubernetes, operators, compose)": schema.findings,
    "cross-checks with the code": crosscheck.findings,
    "metrics, targets and runbooks": monitoring.findings,
    "hardening and references": hardening.findings,
    "locked requirements": locks.findings,
}


def main() -> int:
    deployment = Deployment()
    if "--write-rules" in sys.argv[1:]:
        rules.write(deployment)
        return 0
    if dockerfiles.hadolint() is None:
        print("hadolint is not installed: Dockerfiles are not linted")
    if renderer() is None:
        print("neither kubectl nor kustomize is installed: manifests are checked as written, overlays not rendered")
    found = 0
    for name, findings in CHECKS.items():
        try:
            problems = list(findings(deployment))
        except RenderError as error:
            problems = [str(error)]
        found += len(problems)
        print(f"{'ok    ' if not problems else 'FAILED'} {name}")
        for problem in problems:
            print(f"       {problem}")
    return 1 if found else 0


sys.exit(main())
