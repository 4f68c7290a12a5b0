// A client outside Python, with nothing but the .proto files: `node client.mjs ADDRESS PROTOS`.
import assert from "node:assert/strict";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [address, protos] = process.argv.slice(2);
const definition = loader.loadSync("loraplex/v1/inference.proto", { includeDirs: [protos], keepCase: true, defaults: true, enums: String });
const { Inference } = grpc.loadPackageDefinition(definition).loraplex.v1;
const client = new Inference(address, grpc.credentials.createInsecure());
const request = { adapter: "plain", prompt: "Once upon a time", sampling: { max_tokens: 10, ignore_eos: true } };

const generate = (message, options = {}) =>
  new Promise((resolve, reject) =>
    client.Generate(message, options, (error, answer) => (error ? reject(error) : resolve(answer))));

const answer = await generate(request);
assert.equal(answer.finish_reason, "LENGTH");
assert.equal(answer.usage.completion_tokens, 10);
assert.equal(answer.adapter.name, "plain");

let text = "";
for await (const message of client.GenerateStream(request)) text += message.text;
assert.equal(text, answer.text);

const long = { ...request, sampling: { max_tokens: 200, ignore_eos: true } };
await assert.rejects(generate(long, { deadline: Date.now() + 10 }), { code: grpc.status.DEADLINE_EXCEEDED });

const call = client.GenerateStream(long);
await assert.rejects(async () => {
  for await (const _ of call) call.cancel();
}, { code: grpc.status.CANCELLED });

await assert.rejects(generate({ ...request, adapter: "nobody" }), { code: grpc.status.NOT_FOUND });
client.close();
