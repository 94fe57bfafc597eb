// Race: one prompt, decoded plainly and with Medusa in turn, then replayed on one clock.
import { html, useEffect, useRef, useState } from "./preact.js";
import { ask, bodyOf } from "./api.js";
import { Controls, Prompt, useCall } from "./form.js";
import { difference, halfCompiled, perStep, record, seen, shown, speed, tokens } from "./runs.js";
import { Coloured, Plain } from "./tokens.js";

const NAMES = { plain: "Plain", medusa: "Medusa" };
const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
const one = (value) => (value == null ? "–" : value.toFixed(value < 10 ? 2 : 1));

export function Race({ model, state, set, recorded }) {
  const [runs, setRuns] = useState(recorded ?? {});
  const [clock, setClock] = useState(null); // ms of the replay; null: everything is shown
  const run = useCall();
  const start = () =>
    run.start(async (signal, onWait) => {
      const found = {};
      setClock(null);
      setRuns({});
      for (const name of ["plain", "medusa"]) {
        const tree = name === "plain" ? "none" : state.tree === "none" ? "model" : state.tree;
        const settings = { ...state, tree, acceptance: "exact", seed: state.seed || "0" };
        const body = bodyOf(model, [{ role: "user", content: state.prompt }], settings, { trace: "steps", cache_prompt: false });
        found[name] = await record(ask(body, signal, onWait), (part) => setRuns({ ...found, [name]: part }));
        setRuns({ ...found });
      }
      if (!still()) setClock(0);
    });
  const complete = !run.busy && runs.plain && runs.medusa;
  return html`<section aria-label="Race">
    ${!recorded && html`<${Prompt} ...${{ state, set, run, start, label: "Race" }} /><${Controls} ...${{ model, state, set, only: "race" }} />`}
    <${Scores} ...${{ runs, complete, model, busy: run.busy }} />
    ${complete && html`<${Clock} ...${{ runs, clock, setClock }} />`}
    <div class="panes">${["plain", "medusa"].map((name) => html`<${Pane} key=${name} ...${{ name, run: runs[name], clock }} />`)}</div>
    <p class="note">The two run in turn, since two at once would slow each other down; then both are replayed on one clock, with
      the times at which their tokens came. The clock starts with the first tokens: reading the prompt is not counted.</p>
  </section>`;
}

function Scores({ runs, complete, model, busy }) {
  const [plain, medusa] = [runs.plain && speed(runs.plain), runs.medusa && speed(runs.medusa)];
  const box = (label, value, id) => html`<div class="score"><b data-score=${id}>${value}</b><span>${label}</span></div>`;
  return html`<div class="scores" aria-live=${busy ? "off" : "polite"}>
    ${box("tokens/s, plain", one(plain), "plain")} ${box("tokens/s, Medusa", one(medusa), "medusa")}
    ${box("speedup", complete && plain && medusa ? `× ${(medusa / plain).toFixed(2)}` : "–", "speedup")}
    ${box("tokens a step", one(runs.medusa && perStep(runs.medusa)), "rate")}
    ${complete && html`<${Same} ...${{ runs, model }} />`}
    ${complete && medusa / plain > 1.05 * perStep(runs.medusa) && html`<p class="same" data-doubt>A speedup above the tokens a step
      is chance: something else slowed the plain run down. Race again.</p>`}
    ${complete && halfCompiled(runs) && html`<p class="same" data-doubt="compiled">Some steps ran compiled and others did not, since the
      server compiles while it has nothing else to do, and trees of one's own never: the speedup says nothing.</p>`}
  </div>`;
}

function Same({ runs, model }) {
  const found = difference(runs.plain, runs.medusa);
  if (!found) return html`<p class="same" data-same="yes">✓ identical: all ${tokens(runs.plain).length} token ids</p>`;
  const { place, words } = found;
  const why = model.medusa.dtype === "float32" ? "" : ` In ${model.medusa.dtype}, rounding decides between tokens that are almost
    equally likely, and a pass over a tree rounds differently from a pass over one token; in float32 the two are identical.`;
  return html`<p class="same" data-same="no">Different from token ${place + 1} on: “${shown(words[0])}” plainly, “${shown(words[1])}” with
    Medusa.${why}</p>`;
}

function Clock({ runs, clock, setClock }) {
  const end = Math.max(...Object.values(runs).map((run) => run.steps.at(-1)?.at ?? 0));
  const frame = useRef();
  const running = clock != null;
  useEffect(() => {
    if (!running) return;
    const start = performance.now();
    const tick = (now) => {
      const at = Math.max(0, now - start);
      setClock((before) => (before == null || at >= end ? null : at)); // null: skipped meanwhile
      if (at < end) frame.current = requestAnimationFrame(tick);
    };
    frame.current = requestAnimationFrame(tick);
    return () => cancelAnimationFrame(frame.current);
  }, [running, end]);
  return html`<div class="row"><button onClick=${() => setClock(running ? null : 0)}>${running ? "Skip" : "Replay"}</button>
    <progress max=${end || 1} value=${clock ?? end} aria-label="Time of the replay"></progress>
    <span class="time">${((clock ?? end) / 1000).toFixed(2)} s</span></div>`;
}

function Pane({ name, run, clock }) {
  const steps = run ? seen(run, clock) : [];
  const Text = name === "medusa" ? Coloured : Plain;
  const number = steps.reduce((sum, step) => sum + step.tokens.length, 0);
  return html`<article class="pane" data-pane=${name}>
    <h2>${NAMES[name]} <small>${number} tokens, ${steps.length} steps</small></h2>
    <${Text} steps=${steps} />
  </article>`;
}
