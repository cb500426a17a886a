// Asks for one query, for a stream of them, and why an item is not in an answer: node built/retrieve.js 127.0.0.1:50051

import { create } from "@bufbuild/protobuf";
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";

import { type FeatureValue, FeatureValueSchema } from "./generated/retrieval/feature/v1/feature_pb.js";
import { Finding, QuerySchema, QueryService } from "./generated/retrieval/query/v1/query_service_pb.js";

const address = process.argv[2] ?? "127.0.0.1:50051";
const client = createClient(QueryService, createGrpcTransport({ baseUrl: `http://${address}` }));

function text(value: string) {
  return create(FeatureValueSchema, { value: { case: "stringValue", value } });
}

function texts(...values: string[]) {
  return create(FeatureValueSchema, { value: { case: "stringList", value: { values } } });
}

function queryOf(features: Record<string, FeatureValue>) {
  return create(QuerySchema, { features });
}

const query = queryOf({ user_id: text("3"), history: texts("21", "4") });

// One query, with a deadline.
const answer = await client.retrieve({ query, k: 5, attributeNames: ["title"] }, { timeoutMs: 5000 });
answer.itemIds.forEach((itemId, place) => {
  const title = answer.attributes[0]?.values[place]?.value;
  console.log(`${place + 1}. ${itemId} ${answer.scores[place]?.toFixed(4)} ${title?.case === "stringValue" ? title.value : ""}`);
});
console.log(`version ${answer.checkpointVersion}, ${answer.shardsAnswered} of ${answer.shardsTotal} shards`);

// Many queries: answers come in their order, and one that fails fails alone.
async function* queries() {
  for (const user of ["1", "2", "3"]) {
    yield { retrieve: { query: queryOf({ user_id: text(user) }), k: 3, excludedItemIds: ["21"] } };
  }
  yield { retrieve: { query: queryOf({ shoe_size: text("42") }), k: 3 } };
}
for await (const { index, outcome } of client.streamRetrieve(queries())) {
  if (outcome.case === "retrieved") {
    console.log(`query ${index}: ${outcome.value.itemIds.join(" ")}`);
  } else {
    console.log(`query ${index}: ${Code[outcome.value?.code ?? Code.Unknown]}: ${outcome.value?.message}`);
  }
}

// Why is this item not here?
const why = await client.explain({ query, itemId: "no such item", k: 5 });
console.log(`${Finding[why.finding]}: ${why.reason}`);

// What is wrong is named.
try {
  await client.retrieve({ query, k: 0 });
} catch (error) {
  console.log(`${Code[ConnectError.from(error).code]}: ${ConnectError.from(error).rawMessage}`);
}
