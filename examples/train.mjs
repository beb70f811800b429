// A job from file to adapter with the openai package: HOLDFAST_KEY=… node train.mjs FILE [MODEL]
import fs from "node:fs";
import { setTimeout } from "node:timers/promises";
import OpenAI from "openai";

const [path, model = "SmolLM2-135M-Instruct"] = process.argv.slice(2);
const url = process.env.HOLDFAST_URL ?? "http://127.0.0.1:8080";
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: process.env.HOLDFAST_KEY });

const file = await client.files.create({ file: fs.createReadStream(path), purpose: "fine-tune" });
let job = await client.fineTuning.jobs.create({ model, training_file: file.id });
console.log("posted", job.id);
while (!["succeeded", "failed", "cancelled"].includes(job.status)) {
  await setTimeout(2000);
  job = await client.fineTuning.jobs.retrieve(job.id);
}
console.log(job.status, job.fine_tuned_model ?? job.error?.message);
if (job.status === "succeeded") {
  const adapter = await client.get(`/fine_tuning/jobs/${job.id}/adapter`, { __binaryResponse: true });
  fs.writeFileSync(`${job.id}.tar`, Buffer.from(await adapter.arrayBuffer()));
  console.log("wrote", `${job.id}.tar`);
}
