// What the page asks the server: one streamed call, the model's card, the metrics. Addresses are relative, for proxies.

const PATIENCE = 5000; // ms in which a server that works says how it is

export class Refused extends Error {
  constructor(status, body, after) {
    super(body?.error?.message ?? `the server answered ${status}`);
    Object.assign(this, { status, code: body?.error?.code, after });
  }
}

export const key = {
  get: () => sessionStorage.getItem("medusa-key") ?? "",
  set: (value) => sessionStorage.setItem("medusa-key", value),
};

const headers = () => ({ "Content-Type": "application/json", ...(key.get() && { Authorization: `Bearer ${key.get()}` }) });

async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers() });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, { error: { message: "the server does not answer" } });
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Refused(response.status, body, Number(response.headers.get("Retry-After")) || undefined);
}

export const card = async () => (await (await call("v1/models")).json()).data[0];

/** How the server is: ready, draining (it ends and takes no new requests), failed (its engine does not work), dead (no answer). */
export async function health() {
  const status = async (path) => (await fetch(path, { signal: AbortSignal.timeout(PATIENCE) })).status;
  try {
    const found = await status("ready");
    if (found !== 503) return found === 200 ? "ready" : "dead";
    return (await status("health")) === 200 ? "draining" : "failed";
  } catch {
    return "dead";
  }
}

/** Numbers of the metrics, by name with labels other than the model's: {"vllm:num_requests_running": 1, …}. */
export async function metrics() {
  const found = {};
  for (const line of (await (await call("metrics")).text()).split("\n")) {
    const match = /^([\w:]+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!match) continue;
    const position = /position="(\d+)"/.exec(match[2] ?? "")?.[1];
    if (!/le="|finished_reason="/.test(match[2] ?? "")) found[match[1] + (position ? `#${position}` : "")] = Number(match[3]);
  }
  return found;
}

/** The body of a call. messages: [{role, content}]; settings: of the form; medusa: fields of our own. */
export function bodyOf(model, messages, settings, medusa = {}) {
  const body = { model: model.id, max_tokens: settings.limit, temperature: settings.temperature };
  if (settings.seed !== "") body.seed = Number(settings.seed);
  if (settings.schema.trim())
    body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: parsed(settings.schema, "JSON schema") } };
  if (model.medusa.chat) body.messages = messages;
  else body.prompt = messages.map((each) => each.content).join("");
  const own = { ...TREES[settings.tree]?.(settings, model) };
  if (settings.tree !== "none" && settings.acceptance === "typical") own.acceptance = "typical";
  const fields = { ...own, ...medusa };
  return Object.keys(fields).length ? { ...body, medusa: fields } : body;
}

/** The fields of each way to choose a tree other than the model's. */
const TREES = {
  none: () => ({ plain: true }),
  nodes: ({ nodes }, model) => ({ tree: { dynamic: { num_nodes: nodes, depth: model.medusa.heads } } }),
  own: ({ paths }, model) => ({ tree: paths ? parsed(paths, "tree") : model.medusa.tree }),
};

function parsed(text, what) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`the ${what} is not JSON: ${error.message}`);
  }
}

export const pathOf = (body) => (body.messages ? "v1/chat/completions" : "v1/completions");

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) throw new Refused(0, { error: { message: "the connection to the server was lost" } });
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

const pause = (seconds, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal.addEventListener("abort", () => (clearTimeout(timer), reject(new DOMException("stopped", "AbortError"))));
  });

/** Stream an answer: {at, trace, text, reason} for each event, `at` in ms. A full server is asked again. */
export async function* ask(body, signal, onWait) {
  let response;
  for (let tries = 0; !response; tries++) {
    try {
      response = await call(pathOf(body), { method: "POST", body: JSON.stringify({ ...body, stream: true }), signal });
    } catch (error) {
      if (![429, 503].includes(error.status) || tries > 60) throw error;
      const seconds = error.after ?? 2;
      onWait?.(`${error.message}; trying again in ${seconds} s`);
      await pause(seconds, signal);
    }
  }
  onWait?.("");
  for await (const event of events(response)) {
    if (event.error) throw new Refused(500, event);
    const choice = event.choices?.[0] ?? {};
    const text = choice.delta?.content ?? choice.text ?? "";
    yield { at: performance.now(), trace: event.medusa, text, reason: choice.finish_reason };
  }
}

/** The call as a program. */
export function program(language, body) {
  const base = new URL(".", location.href).href.replace(/[?#].*/, "");
  const json = JSON.stringify(body, null, 2);
  if (language === "curl") {
    const quoted = json.replaceAll("'", "'\\''");
    return `curl ${base}${pathOf(body)} -H "Content-Type: application/json" -H "Authorization: Bearer $KEY" -d '${quoted}'`;
  }
  const method = body.messages ? "chat.completions" : "completions";
  const said = body.messages ? "message.content" : "text";
  const { medusa, ...rest } = body;
  if (language === "JavaScript")
    return `import OpenAI from "openai";\n\nconst client = new OpenAI({ baseURL: "${base}v1", apiKey: "KEY" });\n` +
      `const answer = await client.${method}.create(${json});\nconsole.log(answer.choices[0].${said});`;
  const fields = Object.entries({ ...rest, ...(medusa && { extra_body: { medusa } }) });
  const lines = fields.map(([name, value]) => `    ${name}=${python(value)},`).join("\n");
  return `from openai import OpenAI\n\nclient = OpenAI(base_url="${base}v1", api_key="KEY")\n` +
    `answer = client.${method}.create(\n${lines}\n)\nprint(answer.choices[0].${said})`;
}

function python(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([k, v]) => `${JSON.stringify(k)}: ${python(v)}`).join(", ")}}`;
  return JSON.stringify(value);
}
