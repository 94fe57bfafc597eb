// Steps: an answer in the colours of its steps, and the tree of the step that is picked out.
import { html, useEffect, useState } from "./preact.js";
import { ask, bodyOf } from "./api.js";
import { Controls, Prompt, useCall } from "./form.js";
import { percent, record, shown } from "./runs.js";
import { Coloured, Tree } from "./tokens.js";

const SLOW = 500; // ms between two steps of the replay

export function Steps({ model, state, set, recorded }) {
  const [found, setFound] = useState(recorded ?? null);
  const [chosen, setChosen] = useState(0);
  const [playing, setPlaying] = useState(false);
  const call = useCall();
  const last = (found?.steps.length ?? 0) - 1;
  useEffect(() => {
    if (!playing) return;
    const timer = setInterval(() => setChosen((now) => Math.min(now + 1, last)), SLOW);
    return () => clearInterval(timer);
  }, [playing, last]);
  useEffect(() => void (playing && chosen >= last && setPlaying(false)), [playing, chosen, last]);
  const start = () =>
    call.start(async (signal, onWait) => {
      setChosen(0);
      setFound(null);
      const body = bodyOf(model, [{ role: "user", content: state.prompt }], state, { trace: "tree" });
      const logprobs = body.messages ? { logprobs: true } : { logprobs: 0 };
      setFound(await record(ask({ ...body, ...logprobs }, signal, onWait), (part) => setFound(part)));
    });
  const move = (event) => {
    const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    setPlaying(false);
    setChosen((now) => Math.max(0, Math.min(last, now + by)));
  };
  const play = () => {
    if (!playing && chosen >= last) setChosen(0);
    setPlaying(!playing);
  };
  return html`<section aria-label="Steps">
    ${!recorded && html`<${Prompt} ...${{ state, set, run: call, start, label: "Decode" }} />
      <${Controls} ...${{ state, set, only: "steps" }} />`}
    ${found && last >= 0 && html`
      <div class="row">
        <button onClick=${play}>${playing ? "Pause" : "Play slowly"}</button>
        <input type="range" min="0" max=${last} value=${chosen} aria-label="Step" aria-valuetext=${`step ${chosen + 1}`}
          onInput=${(event) => (setPlaying(false), setChosen(Number(event.target.value)))} />
        <span class="time">${chosen + 1} / ${last + 1}</span>
      </div>
      <div class="pane" tabindex="0" role="group" aria-label="Answer; arrow keys choose a step" onKeyDown=${move}>
        <${Coloured} steps=${playing ? found.steps.slice(0, chosen + 1) : found.steps} chosen=${chosen}
          onChoose=${(i) => !playing && setChosen(i)} />
      </div>
      <${Facts} ...${{ found, chosen }} />`}
    <p class="note">Tokens of one colour came from one step. Choose a step with the mouse, the arrow keys or the slider. Its tree is
      what the heads guessed, checked in one pass; a percentage is the probability that the model itself gives to a word there, before
      temperature. ␣ is a space, ⏎ a new line, ∅ a token that completes no character.</p>
  </section>`;
}

function Facts({ found, chosen }) {
  const step = found.steps[chosen];
  const before = found.steps.slice(0, chosen).reduce((sum, each) => sum + each.tokens.length, 0);
  const path = (step.nodes ?? []).filter((node) => node.accepted); // names also what is not part of the text
  const word = (piece, i) => {
    const logprob = found.logprobs[before + i];
    return html`<li key=${i}><b>${shown(path[i]?.text ?? piece)}</b>${logprob != null && html` <small>${percent(Math.exp(logprob))},
      log-probability ${logprob.toFixed(2)}</small>`}</li>`;
  };
  return html`<div class="facts" data-chosen=${chosen}>
    <h2>Step ${chosen + 1}: ${step.tokens.length} ${step.tokens.length === 1 ? "token" : "tokens"}${" "}
      <small>${step.ms.toFixed(1)} ms, a tree of depth ${step.depth}${step.nodes && `, ${step.nodes.length} nodes`}</small></h2>
    <ol class="words">${step.pieces.map(word)}</ol>
    ${step.nodes && html`<${Tree} nodes=${step.nodes} />`}
  </div>`;
}
