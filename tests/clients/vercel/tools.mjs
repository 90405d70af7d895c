// The Vercel AI SDK: node tools.mjs URL PROVIDER; writes what came of it as JSON.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";

const [url, provider] = process.argv.slice(2);
const apiKey = "none";
const baseURL = `${url}/v1`;
const model = {
  compatible: () =>
    createOpenAICompatible({ name: "engineroom", baseURL, apiKey, supportsStructuredOutputs: true })(
      "default",
    ),
  chat: () => createOpenAI({ baseURL, apiKey }).chat("default"),
  responses: () => createOpenAI({ baseURL, apiKey }).responses("default"),
  anthropic: () => createAnthropic({ baseURL, apiKey })("default"),
}[provider]();

const cities = ["Paris", "Rome", "Oslo"];
const schema = z.object({ city: z.enum(cities), sunny: z.boolean() });
const ran = [];
const weather = tool({
  description: "How the weather is in a city",
  inputSchema: z.object({ city: z.enum(cities) }),
  execute: async ({ city }) => {
    ran.push(city);
    return "sunny, 21 degrees";
  },
});
const how = { model, prompt: "How is the weather in Paris?", maxOutputTokens: 200, temperature: 0 };
// The first step has to call the tool, the second one answers with its result.
const calling = {
  ...how,
  tools: { weather },
  stopWhen: stepCountIs(2),
  prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
};

const called = await generateText(calling);
const streamed = streamText(calling);
let text = "";
for await (const part of streamed.textStream) text += part;
const steps = await streamed.steps;
const object = (await generateObject({ ...how, schema })).object;
const parts = streamObject({ ...how, schema });
for await (const _ of parts.partialObjectStream);
console.log(
  JSON.stringify({
    ran,
    text: called.text,
    calls: called.steps[0].toolCalls.map((call) => call.toolName),
    streamed: text,
    streamedCalls: steps[0].toolCalls.map((call) => call.toolName),
    object,
    streamedObject: await parts.object,
  }),
);
