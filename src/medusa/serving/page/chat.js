// Chat: a conversation, and the call that makes it as a program.
import { html, useState } from "./preact.js";
import { ask, bodyOf, program } from "./api.js";
import { Controls, Prompt, useCall } from "./form.js";
import { perStep, record, speed, tokens } from "./runs.js";
import { Coloured } from "./tokens.js";

export function Chat({ model, state, set, linkOf }) {
  const [history, setHistory] = useState([]); // [{role, content, run}]
  const run = useCall();
  const answer = (messages, prompt) =>
    run.start(async (signal, onWait) => {
      const body = bodyOf(model, conversation(messages, state), state, { trace: "steps" }); // or the prompt stays in the form
      const show = (found) => setHistory([...messages, { role: "assistant", content: found.text, run: found }]);
      setHistory(messages);
      set({ prompt });
      show(await record(ask(body, signal, onWait), show));
    });
  const start = () => answer([...history, { role: "user", content: state.prompt }], "");
  const again = () => answer(history.slice(0, history.findLastIndex((each) => each.role === "user") + 1), state.prompt);
  return html`<section aria-label="Chat">
    <div class="history" role="log" aria-busy=${run.busy} aria-label="Conversation">${history.map((each, i) => html`<${Said} key=${i} ...${each} />`)}</div>
    <${Prompt} ...${{ state, set, run, start, label: model.medusa.chat ? "Send" : "Continue" }} />
    <div class="row">
      <button disabled=${run.busy || !history.length} onClick=${again}>Regenerate</button>
      <button disabled=${run.busy || !history.length} onClick=${() => setHistory([])}>New conversation</button>
    </div>
    <${Controls} ...${{ model, state, set, only: "chat" }} />
    <${Program} ...${{ model, state, history, linkOf }} />
    ${!model.medusa.chat && html`<p class="note">This model has no chat template: it continues your text.</p>`}
  </section>`;
}

/** The messages of a call: what was said, with the system prompt before it. */
const conversation = (history, state) => [
  ...(state.system ? [{ role: "system", content: state.system }] : []),
  ...history.map(({ role, content }) => ({ role, content })),
];

const ENDS = { length: "; cut at the limit", abort: "; ended by the server" };

function Said({ role, content, run }) {
  const facts = run && speed(run) && `${tokens(run).length} tokens, ${speed(run).toFixed(1)} tokens/s, ${perStep(run).toFixed(2)} a step`;
  return html`<article class=${`said-${role}`}><h2>${role}</h2>
    ${run?.steps.length ? html`<${Coloured} steps=${run.steps} />` : html`<p class="text">${content}</p>`}
    ${facts && html`<small>${facts}${ENDS[run.reason]}</small>`}</article>`;
}

function Program({ model, state, history, linkOf }) {
  const [language, setLanguage] = useState("curl");
  const [said, setSaid] = useState("");
  const asked = history.filter((each) => each.role === "user").length && !state.prompt
    ? history.slice(0, history.findLastIndex((each) => each.role === "user") + 1)
    : [...history, { role: "user", content: state.prompt }];
  const link = new URL(linkOf({ ...state, prompt: asked.at(-1).content }), location.href).href;
  let text;
  try {
    text = program(language, bodyOf(model, conversation(asked, state), state));
  } catch (error) {
    text = `No call: ${error.message}`;
  }
  const copy = (what) => navigator.clipboard.writeText(what).then(() => setSaid("Copied."), () => setSaid("Not allowed; select it."));
  return html`<details class="program"><summary>As a program</summary>
    <div class="row" role="group" aria-label="Language">${["curl", "Python", "JavaScript"].map((each) => html`<button key=${each}
      aria-pressed=${each === language} onClick=${() => setLanguage(each)}>${each}</button>`)}
      <button onClick=${() => copy(text)}>Copy</button> <button onClick=${() => copy(link)}>Copy link</button>
      <span role="status">${said}</span></div>
    <pre tabindex="0">${text}</pre></details>`;
}
