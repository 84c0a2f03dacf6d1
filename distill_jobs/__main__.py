from distill_jobs.cli import app

app(prog_name="python -m distill_jobs")
