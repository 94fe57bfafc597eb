// The form that the views share: prompt, settings, and a call that can be stopped.
import { html, useRef, useState } from "./preact.js";

/** One call at a time: start(work(signal, onWait)), stop(), and what is to be said of it. */
export function useCall() {
  const [busy, setBusy] = useState(false);
  const [said, setSaid] = useState("");
  const control = useRef();
  const start = async (work) => {
    if (control.current) return;
    control.current = new AbortController();
    setBusy(true);
    setSaid("");
    try {
      await work(control.current.signal, setSaid);
    } catch (error) {
      setSaid(error.name === "AbortError" ? "Stopped." : `Failed: ${error.message}`);
    } finally {
      control.current = null;
      setBusy(false);
    }
  };
  return { busy, said, start, stop: () => control.current?.abort() };
}

export function Prompt({ state, set, run, start, label }) {
  const go = (event) => (event.preventDefault(), run.busy ? run.stop() : start());
  const enter = (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && (run.busy || state.prompt) && go(event);
  return html`<form class="prompt" onSubmit=${go}>
    <label>Prompt <textarea rows="3" value=${state.prompt} onKeyDown=${enter}
      onInput=${(event) => set({ prompt: event.target.value })}></textarea></label>
    <button class="main" disabled=${!run.busy && !state.prompt}>${run.busy ? "Stop" : label}</button>
    <p class="said" role="status">${run.said}</p>
  </form>`;
}

const TREES = [["model", "the model's"], ["none", "none: plain decoding"], ["nodes", "the likeliest nodes"], ["own", "written as JSON"]];

/** The settings. only: the view, which leaves out what it has no use for. */
export function Controls({ model, state, set, only }) {
  const number = (name, label, rest) => html`<label>${label} <input type="number" value=${state[name]} ...${rest}
    onInput=${(event) => event.target.value !== "" && event.target.validity.valid && set({ [name]: Number(event.target.value) })} /></label>`;
  const choice = (name, label, options) => html`<label>${label} <select value=${String(state[name])}
    onChange=${(event) => set({ [name]: options.find(([value]) => String(value) === event.target.value)[0] })}>
    ${options.map(([value, text]) => html`<option value=${String(value)} selected=${value === state[name]}>${text}</option>`)}</select></label>`;
  return html`<details class="settings"><summary>Settings</summary><div>
    ${number("limit", "Most tokens", { min: 1, max: 4096 })}
    ${number("temperature", "Temperature", { min: 0, max: 2, step: 0.1 })}
    <label>Seed <input type="number" min="0" value=${state.seed} placeholder="none" onInput=${(event) => set({ seed: event.target.value })} /></label>
    ${choice("tree", "Tree", TREES.filter(([name]) => only !== "race" || name !== "none"))}
    ${state.tree === "nodes" && number("nodes", "Nodes", { min: 2, max: 128 })}
    ${only !== "race" && choice("acceptance", "Acceptance", [["exact", "exact"], ["typical", "typical (not lossless)"]])}
    ${state.tree === "own" && html`<label class="wide">Tree as JSON <textarea rows="2" spellcheck="false"
      value=${state.paths || JSON.stringify(model.medusa.tree)} onInput=${(event) => set({ paths: event.target.value })}></textarea></label>`}
    <label class="wide">JSON schema <textarea rows="2" spellcheck="false" value=${state.schema} placeholder="none: free text"
      onInput=${(event) => set({ schema: event.target.value })}></textarea></label>
    ${only === "chat" && html`<label class="wide">System prompt <textarea rows="2" value=${state.system}
      onInput=${(event) => set({ system: event.target.value })}></textarea></label>`}
  </div></details>`;
}
