"""A job from file to adapter with the openai package: HOLDFAST_KEY=… python train.py FILE [MODEL]"""
import os
import pathlib
import sys
import time

import openai

path, model = sys.argv[1], (sys.argv[2:] or ["SmolLM2-135M-Instruct"])[0]
url = os.environ.get("HOLDFAST_URL", "http://127.0.0.1:8080")
client = openai.OpenAI(base_url=f"{url}/v1", api_key=os.environ["HOLDFAST_KEY"])

with open(path, "rb") as rows:
    file = client.files.create(file=rows, purpose="fine-tune")
job = client.fine_tuning.jobs.create(model=model, training_file=file.id)
print("posted", job.id)
while job.status not in ("succeeded", "failed", "cancelled"):
    time.sleep(2)
    job = client.fine_tuning.jobs.retrieve(job.id)
print(job.status, job.fine_tuned_model or (job.error and job.error.message))
if job.status == "succeeded":
    adapter = client.get(f"/fine_tuning/jobs/{job.id}/adapter", cast_to=bytes)
    pathlib.Path(f"{job.id}.tar").write_bytes(adapter)
    print("wrote", f"{job.id}.tar")
