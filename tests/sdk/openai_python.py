"""The unmodified `openai` package against Holdfast: only the base URL and the key differ from OpenAI's own service.

Run by the test of tests/service/clients.rs, which sets OPENAI_BASE_URL, OPENAI_API_KEY and HOLDFAST_MODEL.
"""
import io
import json
import os
import tarfile
import time

import openai

client = openai.OpenAI(max_retries=0)
model = os.environ["HOLDFAST_MODEL"]


def rows(count):
    for i in range(count):
        label = "positive" if i % 2 else "negative"
        yield {"messages": [{"role": "user", "content": f"review number {i}"}, {"role": "assistant", "content": label}]}


content = "".join(json.dumps(row) + "\n" for row in rows(16)).encode()
file = client.files.create(file=("train.jsonl", content), purpose="fine-tune")
assert client.files.wait_for_processing(file.id).status == "processed"
assert client.files.content(file.id).read() == content
assert [f.id for f in client.files.list()] == [file.id]

try:
    client.files.create(file=("bad.jsonl", b"nonsense\n"), purpose="fine-tune")
    raise SystemExit("a bad dataset was accepted")
except openai.BadRequestError as error:
    assert error.code == "invalid_dataset" and error.param == "file", error
    assert error.body["errors"][0]["line"] == 1, error.body

job = client.fine_tuning.jobs.create(
    model=model,
    training_file=file.id,
    suffix="sdk",
    seed=1,
    metadata={"team": "reviews"},
    method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": "auto"}}},
    extra_body={"safety": {"defense": "safegrad", "rho": 1.0}},
)
assert job.id in [j.id for j in client.fine_tuning.jobs.list(limit=5)]
assert job.id in [j.id for j in client.fine_tuning.jobs.list(metadata={"team": "reviews"})]
assert not list(client.fine_tuning.jobs.list(metadata={"team": "other"}))

deadline = time.monotonic() + 300
while job.status not in ("succeeded", "failed", "cancelled"):
    assert time.monotonic() < deadline, job
    time.sleep(0.5)
    job = client.fine_tuning.jobs.retrieve(job.id)
assert job.status == "succeeded", job.error
assert job.fine_tuned_model.startswith(f"ft:{model}:") and job.trained_tokens > 0

events = list(client.fine_tuning.jobs.list_events(job.id, limit=3))  # several pages
messages = [event.message for event in events]
assert len(set(event.id for event in events)) == len(events)
assert messages[0] == "The job has successfully completed", messages[0]
assert any(event.type == "metrics" and event.data["train_loss"] > 0 for event in events)

assert client.models.retrieve(job.fine_tuned_model).id == job.fine_tuned_model
assert {m.id for m in client.models.list()} == {model, job.fine_tuned_model}

archive = client.get(f"/fine_tuning/jobs/{job.id}/adapter", cast_to=openai.HttpxBinaryResponseContent).read()
with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
    assert sorted(tar.getnames()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.load(tar.extractfile("adapter_config.json"))
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == model

try:
    client.fine_tuning.jobs.cancel(job.id)
    raise SystemExit("a finished job was cancelled")
except openai.BadRequestError as error:
    assert error.code == "invalid_state", error
client.files.delete(file.id)
try:
    client.files.retrieve(file.id)
    raise SystemExit("a deleted file was found")
except openai.NotFoundError as error:
    assert error.code == "not_found", error
try:
    openai.OpenAI(api_key="hf-wrong", max_retries=0).files.list()
    raise SystemExit("a wrong key was accepted")
except openai.AuthenticationError as error:
    assert error.code == "invalid_api_key", error
