// OpenAI's Node client: models, an answer, a stream with usage, and an error.
import OpenAI, { NotFoundError } from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const names = (await client.models.list()).data.map((each) => each.id);
const whole = await client.chat.completions.create({ model, messages, temperature: 0, max_tokens: 40 });
const stream = await client.chat.completions.create({
  model,
  messages,
  temperature: 0,
  max_tokens: 40,
  stream: true,
  stream_options: { include_usage: true },
});
let text = "";
let usage;
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
const refused = await client.chat.completions.create({ model: "other", messages }).catch((error) => error);
const right =
  names.includes(model) &&
  text === whole.choices[0].message.content &&
  usage.completion_tokens === whole.usage.completion_tokens &&
  refused instanceof NotFoundError;
console.log(`openai ${process.env.npm_package_version ?? ""} (Node): ${right ? "ok" : "WRONG"}: ${JSON.stringify(text)}`);
process.exit(right ? 0 : 1);
