"""What the contract cannot say in a schema, and what a schema says that HTTP cannot."""

import json
import os

import schemathesis
from schemathesis.core.failures import Failure

# Ids of a job that has run, of its training file, and of its base model, if there are any.
JOB, FILE, MODEL = (os.environ.get(f"HOLDFAST_{name}") for name in ("JOB", "FILE", "MODEL"))

# Refusals of requests that are well formed: what is there, what was done before, or what the operator allows forbids them.
REASONS = {
    "alignment_set_not_found",
    "already_made",
    "contradiction",
    "file_in_use",
    "held_back",
    "idempotency_key_reused",
    "incomplete",
    "invalid_dataset",
    "invalid_state",
    # A suite that asks the same twice.
    "invalid_suite",
    "model_in_use",
    "model_not_found",
    "name_taken",
    "no_evidence",
    "part_not_found",
    "receiver_unreachable",
    "safety_below_floor",
    "suite_not_found",
    # Rows that no base model's template takes as they are.
    "template_mismatch",
    "too_large",
    "too_many_bytes",
    "too_many_parts",
    "too_many_webhooks",
    "wrong_purpose",
    "wrong_size",
    # Schemas count characters where the service counts bytes, and have no word for "holds no U+0000" in a map.
    "invalid_filename",
    "invalid_mime_type",
    "invalid_text",
    # Fields nobody asked for, whose names or values no form can hold.
    "invalid_form",
    "too_long",
    # Addresses that are private, or no URL beyond what a pattern can tell.
    "invalid_url",
}

# HTTP asks for conditions that cannot be read to be ignored.
CONDITIONS = ["Range", "If-Range", "If-None-Match"]


@schemathesis.hook
def map_path_parameters(context, path_parameters):
    """Nothing in the contract makes a job that has run, so one is named from outside."""
    if JOB and path_parameters and "fine_tuning_job_id" in path_parameters:
        path_parameters["fine_tuning_job_id"] = JOB
    return path_parameters


@schemathesis.hook
def map_body(context, body):
    """Without a file and a model that are there, nothing else in a request for a job is looked at."""
    if FILE and MODEL and context.operation.path == "/v1/fine_tuning/jobs/estimate" and isinstance(body, dict):
        body |= {key: value for key, value in (("training_file", FILE), ("model", MODEL)) if isinstance(body.get(key), str)}
    return body


def holds_whole_float(value) -> bool:
    if isinstance(value, dict | list):
        return any(map(holds_whole_float, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and value.is_integer()


@schemathesis.hook
def filter_failure(context, failure: Failure, case, response) -> bool:
    """Keeps a failure, unless it is one that is no defect."""
    name = type(failure).__name__
    if name == "RejectedPositiveData" and response.status_code in (400, 413):
        error = json.loads(response.content)["error"]
        # Only an operator's key may be without a project.
        if error["code"] == "missing" and case.operation.path == "/admin/keys":
            return False
        # To JSON Schema 3.0 is an integer. No client writes it, and the service takes it for the number it is.
        return not (error["code"] in REASONS or error["code"] == "invalid_type" and holds_whole_float(case.body))
    if name == "AcceptedNegativeData" and any(f"`{header}`" in str(failure) for header in CONDITIONS):
        return False
    if name == "AcceptedNegativeData":
        # A query holds only text, so that nothing in it can have a wrong type inside `metadata[key]`.
        return not (case.operation.path == "/v1/fine_tuning/jobs" and case.method == "GET" and "`metadata`" in str(failure.message))
    return True
