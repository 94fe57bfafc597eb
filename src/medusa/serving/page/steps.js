// Steps: an answer in the colours of its steps, and the tree of the step that is picked out.
import { html, useEffect, useRef, useState } from "./preact.js";
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
  const pane = useRef(), follows = useRef(false); // a step that the mouse chooses is in sight; another is brought there
  const last = (found?.steps.length ?? 0) - 1;
  useEffect(() => {
    if (!playing) return;
    const timer = setInterval(() => setChosen((now) => Math.min(now + 1, last)), SLOW);
    return () => clearInterval(timer);
  }, [playing, last]);
  useEffect(() => void (follows.current && pane.current?.querySelector(".chosen")?.scrollIntoView({ block: "nearest" })), [chosen]);
  useEffect(() => void (playing && chosen >= last && setPlaying(false)), [playing, chosen, last]);
  const start = () =>
    call.start(async (signal, onWait) => {
      setChosen(0);
      setFound(null);
      const body = bodyOf(model, [{ role: "user", content: state.prompt }], state, { trace: "tree" });
      setFound(await record(ask(body, signal, onWait), (part) => setFound(part)));
    });
  const choose = (i) => {
    follows.current = true;
    setPlaying(false);
    setChosen(Math.max(0, Math.min(last, i)));
  };
  const move = (event) => {
    const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity }[event.key];
    if (!by) return;
    event.preventDefault();
    choose(chosen + by);
  };
  const point = (i) => {
    follows.current = false;
    if (!playing) setChosen(i);
  };
  const play = () => {
    follows.current = true;
    if (!playing && chosen >= last) setChosen(0);
    setPlaying(!playing);
  };
  return html`<section aria-label="Steps">
    ${!recorded && html`<${Prompt} ...${{ state, set, run: call, start, label: "Decode" }} />
      <${Controls} ...${{ model, state, set, only: "steps" }} />`}
    ${found && last >= 0 && html`
      <div class="row">
        <button onClick=${play}>${playing ? "Pause" : "Play slowly"}</button>
        <input type="range" min="0" max=${last} value=${chosen} aria-label="Step" aria-valuetext=${`step ${chosen + 1}`}
          onInput=${(event) => choose(Number(event.target.value))} />
        <span class="time">${chosen + 1} / ${last + 1}</span>
      </div>
      <div class="pane answer" ref=${pane} tabindex="0" role="group" aria-label="Answer; arrow keys choose a step" onKeyDown=${move}>
        <${Coloured} steps=${playing ? found.steps.slice(0, chosen + 1) : found.steps} chosen=${chosen}
          onChoose=${point} />
      </div>
      <${Facts} ...${{ step: found.steps[chosen], chosen, playing }} />`}
    <p class="note">Tokens of one colour came from one step. Choose a step with the mouse, the arrow keys or the slider. Its tree is
      what the heads guessed, checked in one pass; a percentage is the probability that the model itself gives to a word there, before
      temperature. ␣ is a space, ⏎ a new line, ∅ a token that completes no character.</p>
  </section>`;
}

function Facts({ step, chosen, playing }) {
  const path = (step.nodes ?? []).filter((node) => node.accepted); // names also what is not part of the text
  const word = (piece, i) => {
    const logprob = step.logprobs?.[i];
    return html`<li key=${i}><b>${shown(path[i]?.text ?? piece)}</b>${logprob != null && html` <small>${percent(Math.exp(logprob))},
      log-probability ${logprob.toFixed(2)}</small>`}</li>`;
  };
  return html`<div class="facts" data-chosen=${chosen}>
    <h2 aria-live=${playing ? "off" : "polite"}>Step ${chosen + 1}: ${step.tokens.length} ${step.tokens.length === 1 ? "token" : "tokens"}${" "}
      <small>${step.ms.toFixed(1)} ms, a tree of depth ${step.depth}${step.nodes && `, ${step.nodes.length} nodes`}</small></h2>
    <ol class="words">${step.pieces.map(word)}</ol>
    ${step.nodes && html`<${Tree} nodes=${step.nodes} />`}
  </div>`;
}
