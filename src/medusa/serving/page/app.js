// The page: its views, the state that its link restores, and how the server is.
import { html, render, useEffect, useLayoutEffect, useState } from "./preact.js";
import { card, health, key } from "./api.js";
import { Chat } from "./chat.js";
import { Live } from "./live.js";
import { Race } from "./race.js";
import { Steps } from "./steps.js";

const VIEWS = { race: ["Race", Race], steps: ["Steps", Steps], chat: ["Chat", Chat], live: ["Live", Live] };
const BEGIN = {
  view: "race", prompt: "", system: "", limit: 128, temperature: 0, seed: "", tree: "model", nodes: 16, paths: "", acceptance: "exact", schema: "",
};
const EXAMPLES = { true: "Explain in a few sentences why the sky is blue.", false: "def fibonacci(n):\n    " };
const WATCHED = 2000; // ms between two looks at the server

/** What the link says, of the right types only: a link may come from anywhere. */
function restored() {
  try {
    const bytes = Uint8Array.from(atob(location.hash.slice(1)), (letter) => letter.charCodeAt(0));
    const found = JSON.parse(new TextDecoder().decode(bytes));
    const known = Object.entries(found).filter(([name, value]) => name in BEGIN && typeof value === typeof BEGIN[name]);
    const state = { ...BEGIN, ...Object.fromEntries(known) };
    return state.view in VIEWS ? state : { ...state, view: BEGIN.view };
  } catch {
    return BEGIN;
  }
}

function linkOf(state) {
  const changed = Object.fromEntries(Object.entries(state).filter(([name, value]) => value !== BEGIN[name]));
  return "#" + btoa(String.fromCharCode(...new TextEncoder().encode(JSON.stringify(changed))));
}

function useModel() {
  const [model, setModel] = useState(null);
  const [how, setHow] = useState("loading"); // or a state of health, locked, wrong
  const look = async () => {
    const now = await health();
    try {
      if (now === "ready") setModel(await card());
      setHow(now);
    } catch (error) {
      setHow(error.status !== 401 ? "dead" : key.get() ? "wrong" : "locked");
    }
  };
  useEffect(() => {
    let gone = false, timer;
    const watch = async () => {
      await look();
      if (!gone) timer = setTimeout(watch, WATCHED);
    };
    watch();
    return () => ((gone = true), clearTimeout(timer));
  }, []);
  return { model, how, look };
}

const SAID = {
  loading: "Asking the server…",
  draining: "The server is shutting down: running answers finish, new ones are refused.",
  failed: "The server's engine has failed; somebody has to restart it. This page goes on by itself when it works again.",
  locked: "This server asks for an API key.",
  wrong: "The server does not know this API key.",
  dead: "The server does not answer. This page goes on by itself when it is back.",
};

function Key({ look }) {
  const enter = (event) => (event.preventDefault(), key.set(event.target.elements.key.value), look());
  return html`<form class="row" onSubmit=${enter}><label>API key <input name="key" type="password" autocomplete="off" /></label>
    <button>Enter</button></form>`;
}

function Tabs({ views, view, choose }) {
  return html`<nav aria-label="Views">${views.map((each) => html`<button key=${each} aria-current=${each === view ? "page" : undefined}
    onClick=${() => choose(each)}>${VIEWS[each][0]}</button>`)}</nav>`;
}

function Page() {
  const [state, setState] = useState(restored);
  const { model, how, look } = useModel();
  const set = (change) => setState((before) => ({ ...before, ...change }));
  useLayoutEffect(() => history.replaceState(null, "", linkOf(state)), [state]);
  useEffect(() => {
    const followed = () => setState(restored());
    addEventListener("hashchange", followed);
    return () => removeEventListener("hashchange", followed);
  }, []);
  useEffect(() => void (model && !state.prompt && state.view !== "chat" && set({ prompt: EXAMPLES[model.medusa.chat] })), [model?.id]);
  return html`<header><h1>Medusa</h1>
      <p>${model && `${model.id}, ${model.medusa.heads} heads, ${model.medusa.dtype}, ${model.medusa.device}`}</p>
      <${Tabs} views=${Object.keys(VIEWS)} view=${state.view} choose=${(view) => set({ view })} /></header>
    ${SAID[how] && html`<p class="banner" role="alert" data-how=${how}>${SAID[how]}</p>`}
    <main>${["locked", "wrong"].includes(how) && html`<${Key} look=${look} />`}
      ${model && Object.entries(VIEWS).map(([name, [, View]]) => (name === "live" && state.view !== name ? null
      : html`<div key=${name} hidden=${state.view !== name}><${View} ...${{ model, state, set, linkOf }} /></div>`))}</main>`;
}

/** A recorded run in a file of its own: no server, the same Race and Steps. */
function Recorded({ model, prompt, race, steps }) {
  const [view, setView] = useState("race");
  return html`<header><h1>Medusa</h1><p>${model.id}, ${model.medusa.dtype}, ${model.medusa.device}; recorded by medusa demo</p>
      <${Tabs} views=${["race", "steps"]} view=${view} choose=${setView} /></header>
    <main><pre class="asked">${prompt}</pre>
      ${view === "race" ? html`<${Race} ...${{ model, recorded: race }} />` : html`<${Steps} ...${{ model, recorded: steps }} />`}</main>`;
}

const recorded = document.getElementById("recorded");
render(recorded ? html`<${Recorded} ...${JSON.parse(recorded.textContent)} />` : html`<${Page} />`, document.getElementById("app"));
