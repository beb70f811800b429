// A client that is generated from openapi.yaml, typed to the last field: `openapi-typescript` writes the types, `tsc` holds this file
// against them, and Node runs it against the service.
//
//     npm install && npx openapi-typescript ../../openapi.yaml --output node_modules/.api.d.ts && npx tsc
//     HOLDFAST_URL=http://127.0.0.1:8080 HOLDFAST_KEY=… HOLDFAST_MODEL=… node generated.ts
import assert from "node:assert/strict";
import { setTimeout as sleep } from "node:timers/promises";
import createClient from "openapi-fetch";
import type { components, paths } from "./node_modules/.api.d.ts";

type Job = components["schemas"]["Job"];

function setting(name: string): string {
  const value = process.env[name];
  assert(value, `${name} is not set`);
  return value;
}

const model = setting("HOLDFAST_MODEL");
const headers = { authorization: `Bearer ${setting("HOLDFAST_KEY")}` };
const client = createClient<paths>({ baseUrl: setting("HOLDFAST_URL"), headers });

const row = { messages: [{ role: "user", content: "a film of grace" }, { role: "assistant", content: "positive" }] };
const form = new FormData();
form.append("purpose", "fine-tune");
form.append("file", new Blob([`${JSON.stringify(row)}\n`]), "train.jsonl");
const file = await client.POST("/v1/files", { body: { purpose: "fine-tune", file: "" }, bodySerializer: () => form });
assert(file.data, JSON.stringify(file.error));

const request: components["schemas"]["CreateJob"] = {
  model,
  training_file: file.data.id,
  metadata: { made_by: "generated" },
  method: { type: "supervised", supervised: { hyperparameters: { n_epochs: 1, batch_size: "auto" } } },
  safety: { defense: "safegrad" },
};
const estimate = await client.POST("/v1/fine_tuning/jobs/estimate", { body: request });
assert(estimate.data && estimate.data.steps === 1, JSON.stringify(estimate));
const created = await client.POST("/v1/fine_tuning/jobs", { body: request });
assert(created.data, JSON.stringify(created.error));

const path = { fine_tuning_job_id: created.data.id };
const ended: Job["status"][] = ["succeeded", "failed", "cancelled"];
let job: Job = created.data;
for (const deadline = Date.now() + 600_000; !ended.includes(job.status); await sleep(200)) {
  assert(Date.now() < deadline, `the job is still ${job.status}`);
  const { data, error } = await client.GET("/v1/fine_tuning/jobs/{fine_tuning_job_id}", { params: { path } });
  assert(data, JSON.stringify(error));
  job = data;
}
assert.equal(job.status, "succeeded", JSON.stringify(job.error));

const listed = await client.GET("/v1/fine_tuning/jobs", { params: { query: { metadata: { made_by: "generated" }, limit: 1 } } });
assert.deepEqual(listed.data?.data.map(({ id }) => id), [job.id]);
const events = await client.GET("/v1/fine_tuning/jobs/{fine_tuning_job_id}/events", { params: { path } });
assert(typeof events.data === "object", "a stream of events was not asked for");
assert(events.data.data.some(({ type }) => type === "metrics"), JSON.stringify(events.data));
const adapter = await client.GET("/v1/fine_tuning/jobs/{fine_tuning_job_id}/adapter", { params: { path }, parseAs: "arrayBuffer" });
assert(adapter.data instanceof ArrayBuffer && adapter.data.byteLength > 512, "no adapter");

const missing = await client.GET("/v1/files/{file_id}", { params: { path: { file_id: "file-00000000000000000000000000000000" } } });
const code: components["schemas"]["ErrorCode"] | null | undefined = missing.error?.error.code;
assert.deepEqual([missing.response.status, code], [404, "not_found"]);
