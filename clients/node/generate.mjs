#!/usr/bin/env node
// Streams one answer from a gateway and prints each event as a line of JSON:
//
//   node generate.mjs "What does itertools.chain do?" --address 127.0.0.1:50051
//
// No generated code: proto-loader reads the contract in protos/ as it is.
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const PROTOS = fileURLToPath(new URL("../../protos", import.meta.url));

/** The clients of package baton.v1: GenerationService, ModelService, AdminService. */
export function load(protos = PROTOS) {
  const definition = protoLoader.loadSync(["baton/v1/generation.proto", "baton/v1/model.proto"], {
    includeDirs: [protos],
    keepCase: true,
    enums: String,
    longs: String,
    oneofs: true, // response.event names the field that is set
  });
  return grpc.loadPackageDefinition(definition).baton.v1;
}

/** Streams the responses to `request`; leaving the loop early cancels the request. */
export async function* generate(client, request, { seconds = 300 } = {}) {
  const call = client.Generate(request, { deadline: Date.now() + seconds * 1000 });
  try {
    yield* call;
  } finally {
    call.cancel();
  }
}

async function main() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      address: { type: "string", default: "127.0.0.1:50051" },
      "max-tokens": { type: "string" },
      temperature: { type: "string" },
      seed: { type: "string" },
      plain: { type: "boolean", default: false }, // text to go on from, not a chat turn
    },
  });
  const [text] = positionals;
  if (text === undefined) {
    console.error('usage: node generate.mjs "text" [--address HOST:PORT] [--max-tokens N] ...');
    return 2;
  }
  const sampling = {};
  if (values.temperature !== undefined) sampling.temperature = Number(values.temperature);
  if (values.seed !== undefined) sampling.seed = values.seed;
  const stopping = {};
  if (values["max-tokens"] !== undefined) stopping.max_tokens = Number(values["max-tokens"]);
  const input = values.plain
    ? { prompt: text }
    : { chat: { messages: [{ role: "user", content: text }] } };

  const client = new (load().GenerationService)(values.address, grpc.credentials.createInsecure());
  try {
    const request = { ...input, sampling, stopping, response: { timing: true } };
    for await (const response of generate(client, request)) {
      const { request_id, event } = response;
      console.log(JSON.stringify({ request_id, event, [event]: response[event] }));
    }
    return 0;
  } catch (error) {
    console.error(JSON.stringify({ status: grpc.status[error.code], message: error.details }));
    return 1;
  } finally {
    client.close();
  }
}

if (process.argv[1] === fileURLToPath(import.meta.url)) process.exitCode = await main();
