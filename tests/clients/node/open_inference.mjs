// The Open Inference Protocol outside Python, with nothing but its .proto file: `node open_inference.mjs ADDRESS PROTOS`.
import assert from "node:assert/strict";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [address, protos] = process.argv.slice(2);
const definition = loader.loadSync("inference/grpc_service.proto", { includeDirs: [protos], keepCase: true, defaults: true, oneofs: true });
const { GRPCInferenceService } = grpc.loadPackageDefinition(definition).inference;
const client = new GRPCInferenceService(address, grpc.credentials.createInsecure());

const bytes = (name, value) => ({ name, datatype: "BYTES", shape: [1], contents: { bytes_contents: [Buffer.from(value)] } });
const flag = (name, value) => ({ name, datatype: "BOOL", shape: [1], contents: { bool_contents: [value] } });
const request = (model_name, { stream = false, max_tokens = 10, id = "" } = {}) => ({
  model_name,
  id,
  inputs: [
    bytes("text_input", "Once upon a time"),
    bytes("sampling_parameters", JSON.stringify({ max_tokens, ignore_eos: true })),
    flag("exclude_input_in_output", true),
    flag("stream", stream),
  ],
});
const text = (response) => response.outputs.find(({ name }) => name === "text_output").contents.bytes_contents[0].toString();
const infer = (message, options = {}) =>
  new Promise((resolve, reject) =>
    client.ModelInfer(message, options, (error, answer) => (error ? reject(error) : resolve(answer))));

const expected = {};
for (const model of ["plain", "head"]) expected[model] = text(await infer(request(model)));
assert.notEqual(expected.plain, expected.head);

// One stream: two adapters side by side and a request that fails, which the others outlive.
const stream = client.ModelStreamInfer();
for (const model of ["plain", "nobody", "head"]) stream.write(request(model, { stream: true, id: model }));
stream.end();
const answers = { plain: "", head: "" };
const last = {};
for await (const { error_message, infer_response } of stream) {
  const { id, parameters } = infer_response;
  last[id] = parameters.triton_final_response.bool_param;
  if (id === "nobody") assert.match(error_message, /nobody/);
  else answers[id] += text(infer_response);
}
assert.deepEqual(answers, expected);
assert.deepEqual(last, { plain: true, nobody: true, head: true });

const long = { stream: true, max_tokens: 200 };
await assert.rejects(infer(request("plain", { max_tokens: 200 }), { deadline: Date.now() + 10 }), { code: grpc.status.DEADLINE_EXCEEDED });
await assert.rejects(infer(request("nobody")), { code: grpc.status.NOT_FOUND });
await assert.rejects(infer(request("plain", long)), { code: grpc.status.INVALID_ARGUMENT });

const cancelled = client.ModelStreamInfer();
cancelled.write(request("plain", long));
await assert.rejects(async () => {
  for await (const _ of cancelled) cancelled.cancel();
}, { code: grpc.status.CANCELLED });
client.close();
