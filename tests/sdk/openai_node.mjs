// The unmodified `openai` package of Node against Holdfast: only the base URL and the key differ from OpenAI's own service.
//
//     npm install
//     OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=… HOLDFAST_ADMIN_KEY=… HOLDFAST_MODEL=… node openai_node.mjs
//
// OPENAI_PACKAGE=openai-6 takes the last version that Node 20 is promised to run, which package.json has beside the newest.
//
// The service must allow webhooks to private addresses (`--private-webhooks`) and have a worker. Extensions that the package does
// not know are sent as plain keys and through its generic `client.get` and `client.post`.
import assert from "node:assert/strict";
import { createHash, randomUUID } from "node:crypto";
import { once } from "node:events";
import fs from "node:fs/promises";
import { createReadStream } from "node:fs";
import http from "node:http";
import os from "node:os";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";

const { OPENAI_BASE_URL, OPENAI_API_KEY, HOLDFAST_MODEL: model, HOLDFAST_ADMIN_KEY } = process.env;
for (const variable of ["OPENAI_BASE_URL", "OPENAI_API_KEY", "HOLDFAST_MODEL", "HOLDFAST_ADMIN_KEY"]) {
  assert(process.env[variable], `${variable} is not set`);
}
const name = process.env.OPENAI_PACKAGE ?? "openai";
const { default: OpenAI, toFile } = await import(name);
const { VERSION } = await import(`${name}/version`);

const client = new OpenAI({ maxRetries: 0 });
const admin = new OpenAI({ maxRetries: 0, baseURL: OPENAI_BASE_URL.replace(/\/v1\/?$/, ""), apiKey: HOLDFAST_ADMIN_KEY });
const jobs = client.fineTuning.jobs;
const run = randomUUID(); // tells this run's files, jobs and keys from those of others

// ---- What every part below uses.

/** A dataset: `count` harmless rows, numbered from `first`. */
function rows(count, first = 0) {
  const row = (i) => ({
    messages: [
      { role: "user", content: `review number ${i}` },
      { role: "assistant", content: i % 2 ? "positive" : "negative" },
    ],
  });
  return Array.from({ length: count }, (_, i) => `${JSON.stringify(row(first + i))}\n`).join("");
}

const upload = async (filename, content, more = {}) =>
  client.files.create({ file: await toFile(Buffer.from(content), filename), purpose: "fine-tune", ...more });

/** Creates a job of one epoch with eight rows a step, unless told otherwise. */
const createJob = (more, options) =>
  jobs.create(
    {
      model,
      training_file: training.id,
      method: { type: "supervised", supervised: { hyperparameters: { n_epochs: 1, batch_size: 8 } } },
      ...more,
    },
    options,
  );

/** Everything on the pages of a list. */
async function all(list) {
  const items = [];
  for await (const item of list) items.push(item);
  return items;
}

const ids = (items) => items.map((item) => item.id);

/** Awaits a call that must be refused, and returns the SDK's error. */
async function refused(errorType, code, call) {
  const error = await call.then(
    (answer) => assert.fail(`expected ${errorType.name} ${code}; the answer was ${JSON.stringify(answer)}`),
    (error) => error,
  );
  assert(error instanceof errorType, error);
  assert.equal(error.code, code, error.message);
  assert(error.type && error.requestID, "an error without a type or a request id");
  return error;
}

/** Waits until `holds` returns something, and returns that. */
async function waitUntil(what, holds, seconds = 600) {
  for (const deadline = Date.now() + seconds * 1000; Date.now() < deadline; await sleep(100)) {
    const found = await holds();
    if (found) return found;
  }
  assert.fail(`waited ${seconds} seconds in vain: ${what}`);
}

/** An HTTP server on a free port; `answer` gets the request, its body, and the response to be written. */
async function serve(answer) {
  const server = http.createServer(async (request, response) => {
    const pieces = [];
    for await (const piece of request) pieces.push(piece);
    answer(request, Buffer.concat(pieces), response);
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  return { url: `http://127.0.0.1:${server.address().port}`, close: () => (server.close(), server.closeAllConnections()) };
}

// ---- Files.

const training = await upload("train.jsonl", rows(16));

async function aFileIsTakenKeptAndGivenBack() {
  assert.deepEqual([training.status, training.filename, training.bytes], ["processed", "train.jsonl", rows(16).length]);
  assert.equal((await client.files.waitForProcessing(training.id)).status, "processed");
  assert.deepEqual(await client.files.retrieve(training.id), training);
  assert.equal(await (await client.files.content(training.id)).text(), rows(16));
  const { response } = await client.files.retrieve(training.id).withResponse();
  assert(response.headers.get("x-request-id"));
}

/** The order of the keys is the order of the form's fields, and a stream has no length that could be told before it. */
async function aFileIsStreamedFromDisk() {
  const folder = await fs.mkdtemp(path.join(os.tmpdir(), "sdk-"));
  const onDisk = path.join(folder, "on disk.jsonl");
  await fs.writeFile(onDisk, rows(1000));
  const stream = () => createReadStream(onDisk);
  for (const form of [{ file: stream(), purpose: "fine-tune" }, { purpose: "fine-tune", file: stream() }]) {
    const file = await client.files.create(form);
    assert.deepEqual([file.filename, file.bytes, file.rows], ["on disk.jsonl", rows(1000).length, 1000]);
    const gone = await client.files.delete(file.id);
    assert.deepEqual([gone.id, gone.deleted], [file.id, true]);
    await refused(OpenAI.NotFoundError, "not_found", client.files.retrieve(file.id));
  }
  await fs.rm(folder, { recursive: true });
}

/** As some versions of Node send it: in chunks, without Content-Length. The form is written by hand, the file first. */
async function aFormMayComeInChunks() {
  const field = (disposition, value) => `--edge\r\nContent-Disposition: form-data; ${disposition}\r\n\r\n${value}\r\n`;
  const form = [field('name="file"; filename="chunks.jsonl"', rows(9)), field('name="purpose"', "fine-tune"), "--edge--\r\n"];
  const response = await fetch(`${client.baseURL}/files`, {
    method: "POST",
    headers: { Authorization: `Bearer ${OPENAI_API_KEY}`, "Content-Type": "multipart/form-data; boundary=edge" },
    body: ReadableStream.from(form.flatMap((text) => text.match(/[^]{1,100}/g)).map((text) => Buffer.from(text))),
    duplex: "half",
  });
  const file = await response.json();
  assert.deepEqual([response.status, file.bytes, file.status], [200, rows(9).length, "processed"], JSON.stringify(file));
  await client.files.delete(file.id);
}

async function aFileMayGoByItself() {
  const file = await upload("short-lived.jsonl", rows(2), { expires_after: { anchor: "created_at", seconds: 3600 } });
  assert.equal(file.expires_at, file.created_at + 3600);
  await client.files.delete(file.id);
  const tooShort = upload("a.jsonl", rows(1), { expires_after: { anchor: "created_at", seconds: 5 } });
  assert.equal((await refused(OpenAI.BadRequestError, "out_of_bounds", tooShort)).param, "expires_after.seconds");
}

async function listsOfFilesComeInPages() {
  const made = [];
  for (let i = 0; i < 5; i++) made.push((await upload(`${i}.jsonl`, rows(1, i))).id);
  const page = await client.files.list({ order: "asc", after: training.id, limit: 3, purpose: "fine-tune" });
  assert.deepEqual([ids(page.data), page.has_more], [made.slice(0, 3), true]);
  assert.deepEqual(ids((await page.getNextPage()).data), made.slice(3), "the next page");
  assert.deepEqual(ids(await all(client.files.list({ order: "asc", after: made[0], limit: 2 }))), made.slice(1));
  assert.deepEqual(ids((await client.files.list({ limit: 2 })).data), [made[4], made[3]], "the newest file comes first");
  for (const id of made) await client.files.delete(id);
}

async function aFileWithBadLinesIsKeptAndNamesThem() {
  const bad = await upload("bad.jsonl", `${rows(1)}nonsense\n{"messages": []}\n`);
  assert.equal(bad.status, "error");
  assert.match(bad.status_details, /line 2/);
  assert.deepEqual([bad.rows, bad.error_count, bad.errors.map((error) => error.line)], [1, 2, [2, 3]]);
  assert.equal(bad.errors[1].path, "messages");
  assert.equal((await client.files.waitForProcessing(bad.id)).status, "error"); // stops at once
  const error = await refused(OpenAI.BadRequestError, "invalid_dataset", createJob({ training_file: bad.id }));
  assert.deepEqual([error.param, error.error.errors], ["training_file", bad.errors]);
  await client.files.delete(bad.id);
}

// ---- Uploads: a file in parts.

async function aFileMayComeInParts() {
  const content = Buffer.from(rows(300));
  const md5 = createHash("md5").update(content).digest("hex");
  const begun = { filename: "parts.jsonl", purpose: "fine-tune", bytes: content.length, mime_type: "application/jsonl" };
  const pending = await client.uploads.create(begun);
  assert.deepEqual([pending.status, pending.bytes], ["pending", content.length]);
  const pieces = [];
  for (let at = 0; at < content.length; at += 9000) pieces.push(content.subarray(at, at + 9000));
  const add = async (data) => client.uploads.parts.create(pending.id, { data: await toFile(data, "part") });
  const part_ids = ids(await Promise.all(pieces.map(add))); // several at a time, in any order
  const complete = (body) => client.uploads.complete(pending.id, body);
  await refused(OpenAI.BadRequestError, "checksum_mismatch", complete({ part_ids, md5: "0".repeat(32) }));
  await refused(OpenAI.BadRequestError, "wrong_size", complete({ part_ids: part_ids.slice(1) }));
  const { status, file } = await complete({ part_ids, md5 });
  assert.deepEqual([status, file.filename, file.status, file.bytes], ["completed", "parts.jsonl", "processed", content.length]);
  assert.equal((await complete({ part_ids, md5 })).file.id, file.id, "one who has not heard the answer asks again");
  assert.equal(await (await client.files.content(file.id)).text(), content.toString());
  await refused(OpenAI.BadRequestError, "invalid_state", add(Buffer.from("more")));
  await client.files.delete(file.id);
}

async function anUploadMayBeGivenUp() {
  const begun = { filename: "no.jsonl", purpose: "fine-tune", bytes: 10, mime_type: "application/jsonl" };
  const { id } = await client.uploads.create(begun);
  assert.equal((await client.uploads.cancel(id)).status, "cancelled");
  const part = toFile(Buffer.from("0123456789"), "part").then((data) => client.uploads.parts.create(id, { data }));
  await refused(OpenAI.BadRequestError, "invalid_state", part);
  await refused(OpenAI.NotFoundError, "not_found", client.uploads.cancel("upload_nothing"));
}

// ---- A look before a job is paid for.

async function aFileIsShownAndAJobEstimated() {
  const preview = await client.get(`/files/${training.id}/preview`, { query: { model, limit: 2 } });
  const learnt = preview.rows[0].segments.filter((segment) => segment.supervised).map((segment) => segment.text);
  assert.match(learnt.join(""), /^negative/);
  const body = { model, training_file: training.id, hyperparameters: { n_epochs: 3, batch_size: 8 } };
  const estimate = await client.post("/fine_tuning/jobs/estimate", { body });
  assert.deepEqual([estimate.steps, estimate.training_file.rows, estimate.files_can_be_used], [6, 16, true]);
}

// ---- A job, from its creation to its adapter.

let job; // made by the first of these

async function aJobIsCreatedPausedAndResumed() {
  const metadata = { run, team: "reviews" };
  job = await createJob({ validation_file: training.id, suffix: "sdk", seed: 1, metadata, safety: { defense: "safegrad" } });
  assert(["validating_files", "queued"].includes(job.status), job.status);
  assert.deepEqual([job.model, job.seed, job.metadata, job.safety.defense], [model, 1, metadata, "safegrad"]);
  assert.deepEqual([job.hyperparameters.n_epochs, job.hyperparameters.batch_size, job.result_files], [1, 8, []]);
  await refused(OpenAI.BadRequestError, "invalid_state", jobs.resume(job.id));
  assert(["pausing", "paused"].includes((await jobs.pause(job.id)).status));
  await waitUntil("the job pauses", async () => (await jobs.retrieve(job.id)).status === "paused");
  await refused(OpenAI.BadRequestError, "invalid_state", jobs.pause(job.id));
  assert(["validating_files", "queued"].includes((await jobs.resume(job.id)).status));
}

async function aJobOfWrongValuesIsRefused() {
  const hyperparameters = { n_epochs: 99 };
  const bad = (code, more) => refused(OpenAI.BadRequestError, code, createJob(more));
  const method = { type: "supervised", supervised: { hyperparameters } };
  assert.equal((await bad("out_of_bounds", { method })).param, "method.supervised.hyperparameters.n_epochs");
  assert.equal((await bad("unsupported_method", { method: { type: "dpo" } })).param, "method.type");
  assert.equal((await bad("safety_below_floor", { safety: { defense: "none" } })).param, "safety.defense");
  const nothing = await refused(OpenAI.NotFoundError, "not_found", createJob({ training_file: "file-nothing" }));
  assert.equal(nothing.param, "training_file");
  const large = await refused(OpenAI.APIError, "too_large", createJob({ metadata: { a: "x".repeat(2_000_000) } }));
  assert.equal(large.status, 413);
}

async function jobsAreListedAndCancelled() {
  const others = [await createJob({ metadata: { run } }), await createJob({ metadata: { run } })];
  const newestFirst = [others[1].id, others[0].id, job.id];
  assert.deepEqual(ids(await all(jobs.list({ limit: 1, metadata: { run } }))), newestFirst, "three pages of one job");
  assert.deepEqual(ids(await all(jobs.list({ metadata: { run, team: "reviews" } }))), [job.id]);
  assert.deepEqual(ids((await jobs.list({ limit: 1, after: newestFirst[0] })).data), [others[0].id]);
  for (const { id } of others) {
    assert.equal((await jobs.cancel(id)).status, "cancelled");
    const error = await refused(OpenAI.BadRequestError, "invalid_state", jobs.cancel(id));
    assert.equal(error.type, "invalid_request_error");
  }
}

/** A stream of the job's events, read by the SDK as it reads streams of its own. */
const follow = (lastSeen) => {
  const headers = { Accept: "text/event-stream", ...(lastSeen && { "Last-Event-ID": lastSeen }) };
  return client.get(`/fine_tuning/jobs/${job.id}/events`, { headers, stream: true });
};

async function eventsAreStreamedUntilTheJobEnds() {
  const streamed = await all(await follow());
  job = await jobs.retrieve(job.id);
  assert.equal(job.status, "succeeded", JSON.stringify(job.error));
  const listed = await all(jobs.listEvents(job.id, { limit: 7 })); // several pages, newest first
  assert.deepEqual(listed.toReversed(), streamed);
  assert.equal(listed[0].message, "The job has successfully completed");
  const figures = streamed.filter((event) => event.type === "metrics" && event.data.train_loss > 0);
  // What comes within half a second is told together, with the figures of the last.
  const told = figures.map((event) => event.data.step);
  assert(told.at(-1) === 2 && told.every((step, at) => at === 0 || step > told[at - 1]), told);
  // One who was cut off goes on after what was seen last; one who has seen everything is told that nothing follows.
  assert.deepEqual(await all(await follow(streamed[4].id)), streamed.slice(5));
  assert.equal((await follow(streamed.at(-1).id).asResponse()).status, 204);
}

async function aJobThatSucceededSaysWhatItMade() {
  assert(job.fine_tuned_model.startsWith(`ft:${model}:${job.organization_id}:sdk:`), job.fine_tuned_model);
  assert(job.trained_tokens > 0 && job.finished_at >= job.created_at && job.error === null);
  for (const change of [jobs.pause, jobs.resume, jobs.cancel]) {
    await refused(OpenAI.BadRequestError, "invalid_state", change.call(jobs, job.id));
  }
  const result = await client.files.retrieve(job.result_files[0]);
  assert.equal(result.purpose, "fine-tune-results");
  const csv = await (await client.files.content(result.id)).text();
  assert.match(csv, /^step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,/);
  for (const checkpoint of await all(jobs.checkpoints.list(job.id, { limit: 1 }))) {
    assert.equal(checkpoint.fine_tuned_model_checkpoint, `${job.fine_tuned_model}:ckpt-step-${checkpoint.step_number}`);
  }
}

async function itsAdapterIsDownloaded() {
  const whole = await client.get(`/fine_tuning/jobs/${job.id}/adapter`, { __binaryResponse: true });
  const tar = Buffer.from(await whole.arrayBuffer());
  assert.equal(tar.subarray(257, 262).toString(), "ustar");
  const config = await client.get(`/fine_tuning/jobs/${job.id}/adapter/adapter_config.json`, { __binaryResponse: true });
  const { peft_type, base_model_name_or_path } = await config.json();
  assert.deepEqual([peft_type, base_model_name_or_path], ["LORA", model]);
  // A download that broke goes on where it was.
  const headers = { Range: `bytes=${tar.length - 1000}-` };
  const rest = await client.get(`/fine_tuning/jobs/${job.id}/adapter`, { headers, __binaryResponse: true });
  assert.deepEqual([rest.status, Buffer.from(await rest.arrayBuffer())], [206, tar.subarray(-1000)]);
}

async function modelsAreListedTrainedOnAndDeleted() {
  const listed = ids(await all(client.models.list()));
  assert(listed.includes(model) && listed.includes(job.fine_tuned_model), listed);
  assert.deepEqual([(await client.models.retrieve(model)).id, (await client.models.retrieve(model)).object], [model, "model"]);
  const further = await createJob({ model: job.fine_tuned_model });
  assert.equal(further.model, job.fine_tuned_model);
  assert.equal((await jobs.cancel(further.id)).status, "cancelled");
  for (const unknown of ["nothing", "no/such/model", "ft:nothing"]) {
    assert.equal((await refused(OpenAI.NotFoundError, "not_found", client.models.retrieve(unknown))).param, "model");
  }
  await refused(OpenAI.PermissionDeniedError, "base_model", client.models.delete(model));
  const gone = await client.models.delete(job.fine_tuned_model);
  assert.deepEqual([gone.id, gone.deleted], [job.fine_tuned_model, true]);
  await refused(OpenAI.NotFoundError, "not_found", client.models.retrieve(job.fine_tuned_model));
  await refused(OpenAI.NotFoundError, "not_found", createJob({ model: job.fine_tuned_model }));
}

// ---- Webhooks.

const notices = []; // headers and bodies
const receiver = await serve((request, body, response) => {
  notices.push({ headers: request.headers, body: body.toString() });
  response.writeHead(204).end();
});
const webhook = await client.post("/webhook_endpoints", { body: { url: `${receiver.url}/hook` } });

async function webhooksSayHowJobsEnded() {
  const ofJob = () => notices.find((notice) => JSON.parse(notice.body).data.id === job.id);
  const { headers, body } = await waitUntil("the job's webhook arrives", ofJob);
  assert(notices.some((notice) => JSON.parse(notice.body).type === "fine_tuning.job.cancelled"));
  const event = await client.webhooks.unwrap(body, headers, webhook.signing_secret);
  assert.deepEqual([event.type, event.data.id, event.id], ["fine_tuning.job.succeeded", job.id, headers["webhook-id"]]);
  const forged = client.webhooks.unwrap(`${body} `, headers, webhook.signing_secret);
  await assert.rejects(forged, OpenAI.InvalidWebhookSignatureError);
  await client.delete(`/webhook_endpoints/${webhook.id}`);
  receiver.close();
}

// ---- Answers that are lost on the way.

/** Makes a call through a proxy that loses the answer to the first request it sees: the connection breaks instead. With `hangsUp`
 * the service sees it break too, while it still works on the request. The SDK tries again by itself. */
async function loseAnAnswer(call, hangsUp = false) {
  const tries = [];
  const proxy = await serve((request, body, response) => {
    tries.push(request.headers);
    const lose = tries.length === 1;
    const upstream = http.request(client.baseURL + request.url, { method: request.method, headers: request.headers });
    upstream.on("error", () => {});
    upstream.on("response", (answer) => {
      if (!lose) answer.pipe(response.writeHead(answer.statusCode, answer.headers));
      else answer.resume().on("end", () => response.destroy());
    });
    upstream.end(body, () => lose && hangsUp && (upstream.destroy(), response.destroy()));
  });
  const made = await call(new OpenAI({ baseURL: proxy.url, maxRetries: 2 }));
  proxy.close();
  assert.deepEqual(tries.map((headers) => headers["x-stainless-retry-count"]), ["0", "1"]);
  return { made, tries };
}

async function aRequestWhoseAnswerIsLostMakesOneJob() {
  for (const hangsUp of [false, true]) {
    const metadata = { token: randomUUID() };
    const create = (sdk) => sdk.fineTuning.jobs.create({ model, training_file: training.id, metadata });
    const { made, tries } = await loseAnAnswer(create, hangsUp);
    assert(!tries.some((headers) => headers["idempotency-key"]), "the SDK sends no Idempotency-Key");
    assert.deepEqual(ids(await all(jobs.list({ metadata }))), [made.id], "one request, one job");
    // And so it is with a change of it: the second try is told what the first did.
    assert.equal((await loseAnAnswer((sdk) => sdk.fineTuning.jobs.cancel(made.id))).made.status, "cancelled");
  }
}

async function aRequestWhoseAnswerIsLostMakesOneFile() {
  const filename = `${run}.jsonl`;
  const create = async (sdk) => sdk.files.create({ file: await toFile(Buffer.from(rows(1)), filename), purpose: "fine-tune" });
  const { made } = await loseAnAnswer(create);
  assert.deepEqual(ids((await all(client.files.list())).filter((file) => file.filename === filename)), [made.id]);
  await client.files.delete(made.id);
}

async function aRequestWithAKeyOfItsOwnIsMadeOnce() {
  const metadata = { token: randomUUID() };
  const keyed = (key, more = { metadata }) => createJob(more, { headers: { "Idempotency-Key": key } });
  const first = await keyed(run);
  assert.equal((await keyed(run)).id, first.id, "the same key, the same request");
  const other = await keyed(`${run}-2`);
  await refused(OpenAI.BadRequestError, "idempotency_key_reused", keyed(run, { metadata: { token: "another" } }));
  assert.deepEqual(ids(await all(jobs.list({ metadata }))), [other.id, first.id]);
  for (const { id } of [first, other]) await jobs.cancel(id);
}

// ---- What a key may do.

async function keysDoWhatTheyMay() {
  const wrong = new OpenAI({ apiKey: "hf-wrong", maxRetries: 0 });
  await refused(OpenAI.AuthenticationError, "invalid_api_key", wrong.files.list());
  const organization = (await admin.get("/admin/organizations")).data[0].id;
  const { id: project } = await admin.post("/admin/projects", { body: { organization, name: `sdk-${run}` } });
  const keys = [];
  const holder = async (more) => {
    keys.push(await admin.post("/admin/keys", { body: { project, name: `sdk-${run}`, ...more } }));
    return new OpenAI({ apiKey: keys.at(-1).key }); // with the SDK's own retries
  };
  const file = () => toFile(Buffer.from(rows(1)), "a.jsonl");

  const reader = await holder({ scopes: ["read"] });
  assert.deepEqual(await all(reader.files.list()), [], "another project sees nothing of this one");
  await refused(OpenAI.NotFoundError, "not_found", reader.files.retrieve(training.id));
  await refused(OpenAI.NotFoundError, "not_found", reader.fineTuning.jobs.retrieve(job.id));
  const create = reader.files.create({ file: await file(), purpose: "fine-tune" });
  await refused(OpenAI.PermissionDeniedError, "insufficient_scope", create);

  const limited = (await holder({ requests_per_minute: 2 })).withOptions({ maxRetries: 0 });
  for (let i = 0; i < 2; i++) await limited.models.list();
  const { headers } = await refused(OpenAI.RateLimitError, "rate_limit_exceeded", limited.models.list());
  assert(headers.get("retry-after") > 0 && headers.get("retry-after") <= 60, headers.get("retry-after"));

  // Nobody tries again what a quota refuses: the SDK is told not to.
  await admin.put(`/admin/projects/${project}/quotas`, { body: { max_stored_bytes: 10 } });
  const tries = [];
  const counted = (url, init) => {
    // The SDK tries `fetch` itself out as well, on an address of its own.
    if (init?.method === "POST") tries.push(url);
    return fetch(url, init);
  };
  const writer = (await holder()).withOptions({ fetch: counted });
  const full = await refused(
    OpenAI.RateLimitError,
    "insufficient_quota",
    writer.files.create({ file: await file(), purpose: "fine-tune" }),
  );
  assert.equal(full.headers.get("x-should-retry"), "false");
  assert.equal(tries.length, 1, "the SDK tried again");

  for (const { id } of keys) await admin.delete(`/admin/keys/${id}`);
  await refused(OpenAI.AuthenticationError, "invalid_api_key", reader.files.list());
}

/** A refusal mostly comes before the file has been sent. A server that then closes the connection leaves this SDK with nothing but
 * a broken pipe, which it reports as a connection error and tries again. */
async function aRefusalIsHeardWhileAFileIsSent() {
  const wrong = new OpenAI({ apiKey: "hf-wrong", maxRetries: 0 });
  const { id } = await client.uploads.create({ filename: "a.jsonl", purpose: "fine-tune", bytes: 1, mime_type: "text/plain" });
  await client.uploads.cancel(id);
  for (const bytes of [100, 1_000_000, 20_000_000]) {
    const file = await toFile(Buffer.alloc(bytes), "a.jsonl");
    for (let i = 0; i < 5; i++) {
      await refused(OpenAI.AuthenticationError, "invalid_api_key", wrong.files.create({ file, purpose: "fine-tune" }));
      await refused(OpenAI.BadRequestError, "invalid_state", client.uploads.parts.create(id, { data: file }));
    }
  }
}

for (const part of [
  aFileIsTakenKeptAndGivenBack,
  aFileIsStreamedFromDisk,
  aFormMayComeInChunks,
  aFileMayGoByItself,
  listsOfFilesComeInPages,
  aFileWithBadLinesIsKeptAndNamesThem,
  aJobIsCreatedPausedAndResumed, // trains while the rest is looked at
  aFileMayComeInParts,
  anUploadMayBeGivenUp,
  aFileIsShownAndAJobEstimated,
  jobsAreListedAndCancelled,
  aJobOfWrongValuesIsRefused,
  aRequestWhoseAnswerIsLostMakesOneJob,
  aRequestWhoseAnswerIsLostMakesOneFile,
  aRequestWithAKeyOfItsOwnIsMadeOnce,
  keysDoWhatTheyMay,
  aRefusalIsHeardWhileAFileIsSent,
  eventsAreStreamedUntilTheJobEnds,
  aJobThatSucceededSaysWhatItMade,
  itsAdapterIsDownloaded,
  webhooksSayHowJobsEnded,
  modelsAreListedTrainedOnAndDeleted,
]) {
  const began = Date.now();
  await part();
  const words = part.name.replaceAll(/[A-Z]/g, (letter) => ` ${letter.toLowerCase()}`);
  console.log(`${((Date.now() - began) / 1000).toFixed(1).padStart(6)} s  ${words}`);
}
await client.files.delete(training.id);
console.log(`openai ${VERSION} works`);
