"""The unmodified `openai` package against Holdfast: only the base URL and the key differ from OpenAI's own service.

Runs under the oldest and the newest `openai` this service is tested with. What a version has no method or argument for is sent
through its generic `client.get` and `client.post`, `extra_body` and `extra_query`, as anyone who uses that version would.

    OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=… HOLDFAST_ADMIN_KEY=… HOLDFAST_MODEL=… python openai_python.py

The service must allow webhooks to private addresses (`--private-webhooks`) and have a worker.
"""
import asyncio
import concurrent.futures
import csv
import hashlib
import http.client
import http.server
import inspect
import io
import json
import os
import pathlib
import tarfile
import tempfile
import threading
import time
import urllib.parse
import urllib.request
import uuid

import openai
from openai.types.fine_tuning import FineTuningJob

client = openai.OpenAI(max_retries=0)
base_url = os.environ["OPENAI_BASE_URL"].rstrip("/")
model = os.environ["HOLDFAST_MODEL"]
admin = openai.OpenAI(max_retries=0, base_url=base_url.removesuffix("/v1"), api_key=os.environ["HOLDFAST_ADMIN_KEY"])
run = uuid.uuid4().hex[:12]  # tells this run's files, jobs and keys from those of others


# ---- What every part below uses.


def rows(count, first=0):
    """A dataset: `count` harmless rows, numbered from `first`."""
    lines = []
    for i in range(first, first + count):
        user = {"role": "user", "content": f"review number {i}"}
        assistant = {"role": "assistant", "content": "positive" if i % 2 else "negative"}
        lines.append(json.dumps({"messages": [user, assistant]}) + "\n")
    return "".join(lines).encode()


def accepts(method, argument):
    """Whether this version of the SDK has the argument."""
    return argument in inspect.signature(method).parameters


def call(method, /, *, extra="extra_body", **arguments):
    """Calls a method of the SDK; arguments that its version does not know yet go along as `extra_body` or `extra_query`."""
    known = {name: value for name, value in arguments.items() if accepts(method, name)}
    unknown = {name: value for name, value in arguments.items() if name not in known}
    return method(**known, **({extra: unknown} if unknown else {}))


def valid(answer):
    """The answer, held against the SDK's own type: the SDK itself lets through whatever comes."""
    type(answer).model_validate(answer.to_dict())
    return answer


def refused(error_type, code, method, /, *args, **arguments):
    """Makes a call that must be refused, and returns the SDK's error."""
    try:
        answer = method(*args, **arguments)
    except error_type as error:
        assert error.code == code, f"expected the code {code!r}: {error.code!r}, {error}"
        assert error.type and error.request_id, f"an error without a type or a request id: {error.body}"
        return error
    raise AssertionError(f"expected {error_type.__name__} {code!r}; the answer was {answer}")


def create_job(sdk=client, **arguments):
    """Creates a job of one epoch with eight rows a step, unless told otherwise."""
    hyperparameters = {"n_epochs": 1, "batch_size": 8, **arguments.pop("hyperparameters", {})}
    method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    arguments = {"model": model, "method": method, "metadata": {"run": run}, **arguments}
    return call(sdk.fine_tuning.jobs.create, **arguments)


def list_jobs(**arguments):
    """Jobs on a first page and, when it is iterated over, on those after it."""
    return call(client.fine_tuning.jobs.list, extra="extra_query", **arguments)


def list_files(**arguments):
    return call(client.files.list, extra="extra_query", **arguments)


def wait_until(what, holds, seconds=600):
    """Waits until `holds` returns something, and returns that."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, f"waited {seconds} seconds in vain: {what}"
        time.sleep(0.1)
    return found


class Server:
    """An HTTP server on a free port while a `with` block runs."""

    def __init__(self, answer_post):
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                answer_post(self, self.rfile.read(int(self.headers.get("content-length", 0))))

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


# ---- Files.

training = client.files.create(file=("train.jsonl", rows(16)), purpose="fine-tune")
validation = client.files.create(file=("valid.jsonl", rows(4, first=16)), purpose="fine-tune")


def a_file_is_taken_kept_and_given_back():
    assert valid(training).status == "processed" and training.filename == "train.jsonl" and training.bytes == len(rows(16))
    assert client.files.wait_for_processing(training.id).status == "processed"
    assert valid(client.files.retrieve(training.id)) == training
    assert client.files.content(training.id).read() == rows(16)
    assert client.files.with_raw_response.retrieve(training.id).headers["x-request-id"]
    with tempfile.TemporaryDirectory() as folder:  # a path and an open file are read and sent by the SDK
        path = pathlib.Path(folder, "on disk.jsonl")
        path.write_bytes(rows(2))
        by_path = client.files.create(file=path, purpose="fine-tune")
        with path.open("rb") as opened:
            by_handle = client.files.create(file=opened, purpose="fine-tune")
    for file in (by_path, by_handle):
        assert file.filename == "on disk.jsonl", file
        deleted = valid(client.files.delete(file.id))
        assert deleted.deleted and deleted.id == file.id
        refused(openai.NotFoundError, "not_found", client.files.retrieve, file.id)


def a_file_may_come_before_its_purpose():
    """This SDK sends the purpose first; others do not. So the form is written by hand."""
    boundary, content = "a-boundary", rows(2)
    form = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="first.jsonl"\r\n\r\n'.encode() + content +
        f'\r\n--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--{boundary}--\r\n'.encode()
    )
    headers = {"Authorization": f"Bearer {client.api_key}", "Content-Type": f"multipart/form-data; boundary={boundary}"}
    with urllib.request.urlopen(urllib.request.Request(f"{base_url}/files", form, headers)) as response:
        file = json.load(response)
    assert file["filename"] == "first.jsonl" and file["bytes"] == len(content) and file["status"] == "processed", file
    client.files.delete(file["id"])


def a_file_may_go_by_itself():
    create = client.files.create
    if not accepts(create, "expires_after"):
        return "this version cannot say when a file is to go"
    file = create(
        file=("short-lived.jsonl", rows(2)), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert valid(file).expires_at == file.created_at + 3600, file
    client.files.delete(file.id)
    error = refused(
        openai.BadRequestError, "out_of_bounds", create,
        file=("a.jsonl", rows(1)), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 5},
    )
    assert error.param == "expires_after.seconds", error.body


def lists_of_files_come_in_pages():
    made = [client.files.create(file=(f"{i}.jsonl", rows(1, first=i)), purpose="fine-tune") for i in range(5)]
    ids = [file.id for file in made]
    page = list_files(order="asc", after=training.id, limit=3, purpose="fine-tune")
    assert [file.id for file in page.data] == [validation.id, *ids[:2]] and page.has_next_page(), page
    listed = list_files(order="asc", after=ids[0], limit=2)
    assert [file.id for file in listed] == ids[1:], "the pages do not follow one another"
    newest = list_files(limit=2).data
    assert [file.id for file in newest] == ids[:-3:-1], "the newest file does not come first"
    assert not any(file.purpose == "fine-tune" for file in client.files.list(purpose="fine-tune-results"))
    for file in made:
        valid(file)
        client.files.delete(file.id)


def a_file_with_bad_lines_is_kept_and_names_them():
    bad = client.files.create(file=("bad.jsonl", rows(1) + b'nonsense\n{"messages": []}\n'), purpose="fine-tune")
    assert valid(bad).status == "error" and "line 2" in bad.status_details, bad
    extension = bad.model_extra
    assert extension["rows"] == 1 and extension["error_count"] == 2, extension
    assert [error["line"] for error in extension["errors"]] == [2, 3], extension
    assert extension["errors"][1]["path"] == "messages" and extension["errors"][1]["message"], extension
    assert client.files.wait_for_processing(bad.id).status == "error"  # stops at once
    error = refused(openai.BadRequestError, "invalid_dataset", create_job, training_file=bad.id)
    assert error.param == "training_file" and error.body["errors"] == extension["errors"], error.body
    error = refused(
        openai.BadRequestError, "invalid_dataset", create_job, training_file=training.id, validation_file=bad.id
    )
    assert error.param == "validation_file", error.body
    client.files.delete(bad.id)


# ---- Uploads: a file in parts.


def a_file_may_come_in_parts():
    content = rows(300)
    pieces = [content[i : i + 9000] for i in range(0, len(content), 9000)]
    upload = client.uploads.create(
        filename="parts.jsonl", purpose="fine-tune", bytes=len(content), mime_type="application/jsonl"
    )
    assert valid(upload).status == "pending" and upload.bytes == len(content) and upload.file is None
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # several at a time, in any order
        parts = list(pool.map(lambda piece: valid(client.uploads.parts.create(upload.id, data=piece)), pieces))
    ids = [part.id for part in parts]
    wrong = hashlib.md5(b"something else").hexdigest()
    refused(openai.BadRequestError, "checksum_mismatch", client.uploads.complete, upload.id, part_ids=ids, md5=wrong)
    refused(openai.BadRequestError, "wrong_size", client.uploads.complete, upload.id, part_ids=ids[:-1])
    for _ in range(2):  # a client that has not heard the answer asks again
        done = client.uploads.complete(upload.id, part_ids=ids, md5=hashlib.md5(content).hexdigest())
        assert valid(done).status == "completed" and done.file.filename == "parts.jsonl", done
    assert done.file.status == "processed" and done.file.bytes == len(content), done
    assert client.files.content(done.file.id).read() == content
    refused(openai.BadRequestError, "invalid_state", client.uploads.parts.create, upload.id, data=b"more")
    refused(openai.BadRequestError, "invalid_state", client.uploads.cancel, upload.id)
    client.files.delete(done.file.id)


def the_sdk_cuts_a_file_into_parts_itself():
    content = rows(50)
    done = client.uploads.upload_file_chunked(
        file=content, filename="chunked.jsonl", bytes=len(content), part_size=1000,
        mime_type="application/jsonl", purpose="fine-tune", md5=hashlib.md5(content).hexdigest(),
    )
    assert valid(done).status == "completed" and client.files.content(done.file.id).read() == content
    client.files.delete(done.file.id)


def an_upload_may_be_given_up():
    upload = client.uploads.create(filename="no.jsonl", purpose="fine-tune", bytes=10, mime_type="application/jsonl")
    part = client.uploads.parts.create(upload.id, data=b"0123456789")
    assert valid(client.uploads.cancel(upload.id)).status == "cancelled"
    refused(openai.BadRequestError, "invalid_state", client.uploads.parts.create, upload.id, data=b"more")
    refused(openai.BadRequestError, "invalid_state", client.uploads.complete, upload.id, part_ids=[part.id])
    refused(openai.NotFoundError, "not_found", client.uploads.cancel, "upload_nothing")


# ---- A look before a job is paid for.


def a_file_is_shown_as_a_model_sees_it():
    options = {"params": {"model": model, "limit": 2}}
    preview = client.get(f"/files/{training.id}/preview", cast_to=object, options=options)
    assert [row["line"] for row in preview["rows"]] == [1, 2], preview
    learnt = "".join(segment["text"] for segment in preview["rows"][0]["segments"] if segment["supervised"])
    assert learnt.startswith("negative"), preview


def a_job_is_estimated():
    body = {"model": model, "training_file": training.id, "hyperparameters": {"n_epochs": 3, "batch_size": 8}}
    estimate = client.post("/fine_tuning/jobs/estimate", body=body, cast_to=object)
    assert estimate["steps"] == 6 and estimate["training_file"]["rows"] == 16 and estimate["trained_tokens"] > 0, estimate
    assert estimate["memory"]["total_bytes"] > 0 and estimate["files_can_be_used"], estimate


# ---- A job, from its creation to its adapter.

job: FineTuningJob  # made by the first of these


def a_job_is_created():
    global job
    job = create_job(
        training_file=training.id, validation_file=validation.id, suffix="sdk", seed=1, safety={"defense": "safegrad"},
        hyperparameters={"n_epochs": 2}, metadata={"run": run, "team": "reviews"},
    )
    assert valid(job).status in ("validating_files", "queued"), job
    assert (job.model, job.seed, job.training_file, job.validation_file) == (model, 1, training.id, validation.id), job
    assert job.hyperparameters.n_epochs == 2 and job.hyperparameters.batch_size == 8, job
    assert job.organization_id and job.result_files == [] and job.fine_tuned_model is None and job.error is None, job
    assert job.model_extra["safety"]["defense"] == "safegrad", "what a job trains under is on the job"


def older_places_and_automatic_values_are_understood():
    auto = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    older = client.fine_tuning.jobs.create(model=model, training_file=training.id, hyperparameters=auto)
    decided = valid(older).hyperparameters
    assert all(isinstance(getattr(decided, name), (int, float)) for name in auto), "what was left open is decided at once"
    assert valid(client.fine_tuning.jobs.cancel(older.id)).status == "cancelled"


def a_job_of_wrong_values_is_refused():
    def bad(code, **arguments):
        return refused(openai.BadRequestError, code, create_job, training_file=training.id, **arguments)

    too_many = bad("out_of_bounds", hyperparameters={"n_epochs": 99})
    assert too_many.param == "method.supervised.hyperparameters.n_epochs", too_many.body
    assert bad("unsupported_method", method={"type": "dpo"}).param == "method.type"
    assert bad("out_of_bounds", metadata={str(i): "x" for i in range(17)}).param == "metadata"
    # A tenant's safety is never weaker than the operator's floor.
    assert bad("safety_below_floor", safety={"defense": "none"}).param == "safety.defense"
    nothing = refused(openai.NotFoundError, "not_found", create_job, training_file="file-nothing")
    assert nothing.param == "training_file", nothing.body
    nothing = refused(openai.NotFoundError, "not_found", create_job, training_file=training.id, model="no/such")
    assert nothing.param == "model", nothing.body
    large = refused(openai.APIStatusError, "too_large", create_job, training_file=training.id, metadata={"a": "x" * 2_000_000})
    assert large.status_code == 413, large


def jobs_are_listed():
    others = [create_job(training_file=training.id, metadata={"run": run, "team": "other"}) for _ in range(2)]
    ids = [others[1].id, others[0].id, job.id]
    of_run = list_jobs(limit=1, metadata={"run": run})
    assert [listed.id for listed in of_run] == ids, "three pages of one job, newest first"
    of_team = list_jobs(metadata={"run": run, "team": "reviews"})
    assert [listed.id for listed in of_team] == [job.id]
    assert not list(list_jobs(metadata={"run": "another"}))
    assert [listed.id for listed in client.fine_tuning.jobs.list(limit=3).data] == ids
    assert [listed.id for listed in client.fine_tuning.jobs.list(limit=1, after=ids[0]).data] == ids[1:2]
    for other in others:
        assert valid(client.fine_tuning.jobs.cancel(other.id)).status == "cancelled"
        error = refused(openai.BadRequestError, "invalid_state", client.fine_tuning.jobs.cancel, other.id)
        assert error.type == "invalid_request_error", error.body


def change(name, job_id):
    """Pauses or resumes a job; older versions have no method for it."""
    method = getattr(client.fine_tuning.jobs, name, None)
    if method:
        return method(job_id)
    return client.post(f"/fine_tuning/jobs/{job_id}/{name}", cast_to=FineTuningJob)


def a_job_is_paused_and_resumed():
    """The SDK's type of a job does not list the two words for this, although it has the methods."""
    refused(openai.BadRequestError, "invalid_state", change, "resume", job.id)

    def trains():
        progress = client.fine_tuning.jobs.retrieve(job.id).model_extra["progress"]
        return progress and progress["step"] >= 1

    wait_until("the job takes its first step", trains)
    pausing = change("pause", job.id)
    assert pausing.status in ("pausing", "paused"), pausing
    wait_until("the job pauses", lambda: client.fine_tuning.jobs.retrieve(job.id).status == "paused")
    refused(openai.BadRequestError, "invalid_state", change, "pause", job.id)
    assert valid(change("resume", job.id)).status in ("queued", "running")


# ---- Events, in pages and as a stream.


def stream_events(last_seen=None):
    """The messages of a stream of events as (id, event); None when nothing can follow."""
    headers = {"Authorization": f"Bearer {client.api_key}", "Accept": "text/event-stream"}
    if last_seen:
        headers["Last-Event-ID"] = last_seen
    request = urllib.request.Request(f"{base_url}/fine_tuning/jobs/{job.id}/events", headers=headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        if response.status == 204:
            return None
        assert response.headers["content-type"].startswith("text/event-stream"), response.headers
        found, fields = [], {}
        for line in io.TextIOWrapper(response, "utf-8"):
            name, _, value = line.rstrip("\n").partition(":")
            if name in ("id", "data"):
                fields[name] = value.removeprefix(" ")
            elif not line.strip() and fields:
                found.append((fields["id"], json.loads(fields["data"])))
                fields = {}
        return found


def events_are_streamed_until_the_job_ends():
    global job
    streamed = stream_events()
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert valid(job).status == "succeeded", f"the stream ended although the job is {job.status}: {job.error}"
    listed = list(client.fine_tuning.jobs.list_events(job.id, limit=7))  # several pages, newest first
    assert [event.id for event in reversed(listed)] == [event_id for event_id, _ in streamed]
    assert all(event_id == event["id"] for event_id, event in streamed)
    assert listed[0].message == "The job has successfully completed", listed[0]
    assert all(valid(event).object == "fine_tuning.job.event" for event in listed)
    metrics = [event["data"] for _, event in streamed if event["type"] == "metrics" and "train_loss" in event["data"]]
    # What comes within half a second is told together, with the figures of the last.
    steps = [figures["step"] for figures in metrics]
    assert steps == sorted(set(steps)) and steps[-1] == 4 and all(f["train_loss"] > 0 for f in metrics), metrics
    # One who was cut off goes on after what was seen last; one who has seen everything is told that nothing follows.
    assert stream_events(last_seen=streamed[4][0]) == streamed[5:]
    assert stream_events(last_seen=streamed[-1][0]) is None
    # The SDK's own reader of streams takes it too.
    read = client.get(
        f"/fine_tuning/jobs/{job.id}/events", cast_to=type(listed[0]), stream=True, stream_cls=openai.Stream[type(listed[0])],
        options={"headers": {"Accept": "text/event-stream"}},
    )
    assert [event.id for event in read] == [event_id for event_id, _ in streamed]


# ---- What a job leaves.


def a_job_that_succeeded_says_what_it_made():
    assert job.fine_tuned_model.startswith(f"ft:{model}:{job.organization_id}:sdk:"), job
    assert job.trained_tokens > 0 and job.finished_at >= job.created_at and job.error is None, job
    assert client.fine_tuning.jobs.retrieve(job.id) == job
    for name in ("pause", "resume"):
        refused(openai.BadRequestError, "invalid_state", change, name, job.id)
    refused(openai.BadRequestError, "invalid_state", client.fine_tuning.jobs.cancel, job.id)


def its_figures_are_a_file():
    (result,) = (client.files.retrieve(file_id) for file_id in job.result_files)
    assert valid(result).purpose == "fine-tune-results" and result.filename.endswith(".csv"), result
    assert result.id in [file.id for file in client.files.list(purpose="fine-tune-results")]
    text = client.files.content(result.id).text
    assert text.startswith("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,"), text.splitlines()[0]
    lines = [line for line in csv.DictReader(io.StringIO(text)) if line["train_loss"]]
    assert [line["step"] for line in lines] == ["1", "2", "3", "4"], text
    assert all(float(value) == float(value) for line in lines for value in line.values() if value), "every value is a number"
    refused(openai.BadRequestError, "wrong_purpose", create_job, training_file=result.id)


def its_checkpoints_are_listed():
    found = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    steps = [checkpoint.step_number for checkpoint in found]
    assert steps == sorted(set(steps), reverse=True), f"newest first, each once: {steps}"
    for checkpoint in found:
        assert valid(checkpoint).fine_tuning_job_id == job.id and checkpoint.metrics.step == checkpoint.step_number
        assert checkpoint.metrics.train_loss > 0, checkpoint
        assert checkpoint.fine_tuned_model_checkpoint == f"{job.fine_tuned_model}:ckpt-step-{checkpoint.step_number}"
        assert valid(client.models.retrieve(checkpoint.fine_tuned_model_checkpoint)).object == "model"
    if not found:
        return "so short a job leaves none"


def its_adapter_is_downloaded():
    archive = client.get(f"/fine_tuning/jobs/{job.id}/adapter", cast_to=bytes)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        assert sorted(tar.getnames()) == ["adapter_config.json", "adapter_model.safetensors", "manifest.json"]
        config = json.load(tar.extractfile("adapter_config.json"))
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == model, config
    one = client.get(f"/fine_tuning/jobs/{job.id}/adapter/adapter_config.json", cast_to=bytes)
    assert json.loads(one) == config


def its_model_can_be_trained_on():
    """The job is cancelled as soon as it has a worker: cancelling works at any time."""
    further = create_job(training_file=training.id, model=job.fine_tuned_model)
    assert valid(further).model == job.fine_tuned_model
    wait_until("a worker takes the job up", lambda: client.fine_tuning.jobs.retrieve(further.id).status == "running")
    assert valid(client.fine_tuning.jobs.cancel(further.id)).status == "cancelled"
    ended = valid(client.fine_tuning.jobs.retrieve(further.id))
    assert ended.status == "cancelled" and ended.fine_tuned_model is None and ended.finished_at, ended


def models_are_listed_and_deleted():
    listed = {listed.id: valid(listed) for listed in client.models.list()}
    assert model in listed and job.fine_tuned_model in listed
    assert valid(client.models.retrieve(model)) == listed[model]
    assert client.models.retrieve(job.fine_tuned_model) == listed[job.fine_tuned_model]
    for name in ("nothing", "no/such/model", "ft:nothing"):  # versions differ in how they send a slash
        assert refused(openai.NotFoundError, "not_found", client.models.retrieve, name).param == "model"
    refused(openai.PermissionDeniedError, "base_model", client.models.delete, model)
    deleted = valid(client.models.delete(job.fine_tuned_model))
    assert deleted.deleted and deleted.id == job.fine_tuned_model
    refused(openai.NotFoundError, "not_found", client.models.retrieve, job.fine_tuned_model)
    refused(openai.NotFoundError, "not_found", create_job, training_file=training.id, model=job.fine_tuned_model)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "succeeded", "the job stays"


# ---- Webhooks.

notices = []  # headers and bodies of what came to /hook: the other webhooks made here may be told of the same jobs
webhook: dict


def take_notice(request, body):
    if request.path == "/hook":
        notices.append((request.headers, body))
    request.send_response(204)
    request.end_headers()


receiver = Server(take_notice)


def a_webhook_is_made():
    global webhook
    webhook = client.post("/webhook_endpoints", body={"url": f"{receiver.url}/hook"}, cast_to=object)
    assert webhook["enabled"] and webhook["signing_secret"].startswith("whsec_"), webhook
    assert "signing_secret" not in client.get(f"/webhook_endpoints/{webhook['id']}", cast_to=object), "the secret is shown once"


def webhooks_are_managed():
    if not hasattr(getattr(client, "webhooks", None), "create"):
        return "this version does not manage webhooks"
    told = ["fine_tuning.job.failed"]
    made = client.webhooks.create(name="managed", url=f"{receiver.url}/managed", event_types=told)
    assert made.id in [endpoint.id for endpoint in client.webhooks.list(limit=1)]
    assert valid(client.webhooks.retrieve(made.id)).event_types == told
    assert valid(client.webhooks.update(made.id, name="renamed")).name == "renamed"
    assert client.webhooks.rotate_secret(made.id).signing_secret != made.signing_secret
    assert valid(client.webhooks.test(made.id, event_type=told[0])).status_code == 204
    assert told[0] in client.webhooks.event_types.list().data
    assert client.webhooks.delete(made.id).deleted
    refused(openai.NotFoundError, "not_found", client.webhooks.retrieve, made.id)


def webhooks_say_how_jobs_ended():
    def of_job():
        return [(headers, body) for headers, body in notices if json.loads(body)["data"]["id"] == job.id]

    ((headers, body),) = wait_until("the job's webhook arrives", of_job)
    kinds = [json.loads(body)["type"] for _, body in notices]
    assert "fine_tuning.job.cancelled" in kinds, kinds
    deliveries = client.get(f"/webhook_endpoints/{webhook['id']}/deliveries", cast_to=object)["data"]
    assert headers["webhook-id"] in [delivery["id"] for delivery in deliveries], deliveries
    client.delete(f"/webhook_endpoints/{webhook['id']}", cast_to=object)
    if not hasattr(client, "webhooks"):
        return "this version does not check signatures"
    event = valid(client.webhooks.unwrap(body, headers, secret=webhook["signing_secret"]))
    assert event.type == "fine_tuning.job.succeeded" and event.data.id == job.id, event
    assert event.id == headers["webhook-id"] and event.object == "event", event
    for wrong in ({"payload": body + b" "}, {"secret": "whsec_" + "A" * 32}):
        try:
            client.webhooks.unwrap(**{"payload": body, "headers": headers, "secret": webhook["signing_secret"], **wrong})
        except openai.InvalidWebhookSignatureError:
            continue
        raise AssertionError(f"a forged webhook was believed: {wrong.keys()}")


# ---- Answers that are lost on the way.


class LossyProxy(Server):
    """Forwards POSTs to the service, and loses the answer to the first: the connection breaks instead. With `hangs_up` the service
    sees it break too, while it still works on the request."""

    def __init__(self, hangs_up=False):
        self.tries = []
        service = urllib.parse.urlsplit(base_url)

        def forward(request, body):
            self.tries.append(request.headers)
            upstream = http.client.HTTPConnection(service.hostname, service.port)
            upstream.request("POST", service.path + request.path, body, dict(request.headers))
            if len(self.tries) == 1:
                if not hangs_up:
                    upstream.getresponse().read()
                upstream.close()
                request.close_connection = True
                return
            response = upstream.getresponse()
            content = response.read()
            request.send_response(response.status)
            request.send_header("Content-Type", response.headers["content-type"])
            request.send_header("Content-Length", str(len(content)))
            request.end_headers()
            request.wfile.write(content)

        super().__init__(forward)

    def __enter__(self):
        super().__enter__()
        self.client = openai.OpenAI(base_url=self.url, max_retries=2)
        return self


def a_request_whose_answer_is_lost_makes_one_job():
    """The SDK sends it again by itself, without an Idempotency-Key."""
    for hangs_up in (False, True):
        token = {"token": uuid.uuid4().hex}
        with LossyProxy(hangs_up) as lossy:
            made = create_job(lossy.client, training_file=training.id, metadata=token)
        assert [headers["x-stainless-retry-count"] for headers in lossy.tries] == ["0", "1"]
        assert not any("idempotency-key" in headers for headers in lossy.tries)
        listed = list(list_jobs(metadata=token))
        assert [listed.id for listed in listed] == [made.id], f"{len(listed)} jobs were made of one request"
        # And so it is with a change of it: the second try is told what the first did.
        with LossyProxy() as lossy:
            assert lossy.client.fine_tuning.jobs.cancel(made.id).status == "cancelled" and len(lossy.tries) == 2


def a_request_whose_answer_is_lost_makes_one_file():
    with LossyProxy() as lossy:
        file = lossy.client.files.create(file=(f"{run}.jsonl", rows(1)), purpose="fine-tune")
    assert len(lossy.tries) == 2
    assert [listed.id for listed in client.files.list() if listed.filename == f"{run}.jsonl"] == [file.id]
    client.files.delete(file.id)


def a_request_whose_answer_is_lost_makes_one_webhook():
    """And its secret is not lost with the answer."""
    url = f"{receiver.url}/{uuid.uuid4().hex}"
    with LossyProxy() as lossy:
        made = lossy.client.post("/webhook_endpoints", body={"url": url}, cast_to=object)
    assert len(lossy.tries) == 2 and made["signing_secret"].startswith("whsec_"), made
    of_url = [hook["id"] for hook in client.get("/webhook_endpoints", cast_to=object)["data"] if hook["url"] == url]
    for webhook_id in of_url:
        client.delete(f"/webhook_endpoints/{webhook_id}", cast_to=object)
    assert of_url == [made["id"]], f"{len(of_url)} webhooks were made of one request"


def a_request_with_a_key_of_its_own_is_made_once():
    def keyed(key, sdk=client, **metadata):
        headers = {"Idempotency-Key": key}
        return sdk.fine_tuning.jobs.create(
            model=model, training_file=training.id, extra_body={"metadata": metadata}, extra_headers=headers
        )

    key, token = f"retrain-{run}", uuid.uuid4().hex
    with LossyProxy() as lossy:
        first = keyed(key, lossy.client, token=token)
    assert len(lossy.tries) == 2
    assert keyed(key, token=token).id == first.id, "the same key, the same request"
    other = keyed(f"{key}-2", token=token)
    assert other.id != first.id, "another key, another request"
    refused(openai.BadRequestError, "idempotency_key_reused", keyed, key, token="another")
    listed = list_jobs(metadata={"token": token})
    assert [listed.id for listed in listed] == [other.id, first.id]
    for made in (first, other):
        client.fine_tuning.jobs.cancel(made.id)


# ---- What a key may do.


def keys_do_what_they_may():
    refused(openai.AuthenticationError, "invalid_api_key", openai.OpenAI(api_key="hf-wrong", max_retries=0).files.list)
    organization = admin.get("/admin/organizations", cast_to=object)["data"][0]["id"]
    project = admin.post("/admin/projects", body={"organization": organization, "name": f"sdk-{run}"}, cast_to=object)["id"]
    keys = []

    def holder(**key):
        keys.append(admin.post("/admin/keys", body={"project": project, "name": f"sdk-{run}", **key}, cast_to=object))
        return openai.OpenAI(api_key=keys[-1]["key"])  # with the SDK's own retries

    reader = holder(scopes=["read"])
    assert list(reader.files.list()) == [], "another project sees nothing of this one"
    refused(openai.NotFoundError, "not_found", reader.files.retrieve, training.id)
    refused(openai.NotFoundError, "not_found", reader.fine_tuning.jobs.retrieve, job.id)
    refused(
        openai.PermissionDeniedError, "insufficient_scope", reader.files.create, file=("a.jsonl", rows(1)), purpose="fine-tune"
    )
    refused(openai.PermissionDeniedError, "insufficient_scope", client.get, "/../admin/keys", cast_to=object)

    limited = holder(requests_per_minute=2).with_options(max_retries=0)
    for _ in range(2):
        limited.models.list()
    error = refused(openai.RateLimitError, "rate_limit_exceeded", limited.models.list)
    wait = int(error.response.headers["retry-after"])
    assert 0 < wait <= 60 and error.response.headers.get("x-should-retry") != "false", error.response.headers

    # Nobody tries again what a quota refuses: the SDK is told not to.
    admin.put(f"/admin/projects/{project}/quotas", body={"max_stored_bytes": 10}, cast_to=object)
    writer = holder()
    error = refused(
        openai.RateLimitError, "insufficient_quota", writer.files.create, file=("a.jsonl", rows(1)), purpose="fine-tune"
    )
    assert error.request.headers["x-stainless-retry-count"] == "0", "the SDK tried again"
    assert error.response.headers["x-should-retry"] == "false"

    for key in keys:
        admin.delete(f"/admin/keys/{key['id']}", cast_to=object)
    refused(openai.AuthenticationError, "invalid_api_key", reader.files.list)


def a_refusal_is_heard_while_a_file_is_sent():
    """A refusal mostly comes before the file has been sent. A server that then closes the connection leaves the SDK, the
    asynchronous one above all, with nothing but a broken connection, and it tries again."""

    async def refuse(size):
        wrong = openai.AsyncOpenAI(api_key="hf-wrong", max_retries=0)
        try:
            await wrong.files.create(file=("a.jsonl", bytes(size)), purpose="fine-tune")
        except openai.AuthenticationError as error:
            assert error.code == "invalid_api_key", error.body
        except openai.APIConnectionError as error:
            raise AssertionError(f"the refusal of a file of {size} bytes was not heard: {error.__cause__!r}") from error
        finally:
            await wrong.close()

    for size in (100, 1_000_000, 20_000_000):
        for _ in range(5):
            asyncio.run(refuse(size))


def files_are_deleted():
    for file in (training, validation):
        assert client.files.delete(file.id).deleted
        refused(openai.NotFoundError, "not_found", client.files.content, file.id)


with receiver:
    for part in (
        a_webhook_is_made,
        webhooks_are_managed,
        a_job_is_created,
        a_job_is_paused_and_resumed,  # and trains while the rest is looked at
        a_file_is_taken_kept_and_given_back,
        a_file_may_come_before_its_purpose,
        a_file_may_go_by_itself,
        lists_of_files_come_in_pages,
        a_file_with_bad_lines_is_kept_and_names_them,
        a_file_may_come_in_parts,
        the_sdk_cuts_a_file_into_parts_itself,
        an_upload_may_be_given_up,
        a_file_is_shown_as_a_model_sees_it,
        a_job_is_estimated,
        jobs_are_listed,
        older_places_and_automatic_values_are_understood,
        a_job_of_wrong_values_is_refused,
        a_request_whose_answer_is_lost_makes_one_job,
        a_request_whose_answer_is_lost_makes_one_file,
        a_request_whose_answer_is_lost_makes_one_webhook,
        a_request_with_a_key_of_its_own_is_made_once,
        keys_do_what_they_may,
        a_refusal_is_heard_while_a_file_is_sent,
        events_are_streamed_until_the_job_ends,
        a_job_that_succeeded_says_what_it_made,
        its_figures_are_a_file,
        its_checkpoints_are_listed,
        its_adapter_is_downloaded,
        its_model_can_be_trained_on,
        webhooks_say_how_jobs_ended,
        models_are_listed_and_deleted,
        files_are_deleted,
    ):
        began = time.monotonic()
        skipped = part()
        name = part.__name__.replace("_", " ") + (f": {skipped}" if skipped else "")
        print(f"{time.monotonic() - began:6.1f} s  {name}", flush=True)
print(f"openai {openai.__version__} works")
