// Text in the colours of its steps, and the tree of a step.
import { html } from "./preact.js";
import { percent, shown } from "./runs.js";

/** The text of steps; chosen: the step that is picked out; onChoose: called with a step's place. */
export function Coloured({ steps, chosen, onChoose }) {
  return html`<p class="text">${steps.map((step, i) => html`<span key=${i} data-step=${i}
      class=${`step c${i % 6} ${chosen === i ? "chosen" : ""}`}
      onMouseEnter=${onChoose && (() => onChoose(i))} onClick=${onChoose && (() => onChoose(i))}>${step.pieces.join("")}</span>`)}</p>`;
}

export function Plain({ steps }) {
  return html`<p class="text">${steps.flatMap((step) => step.pieces).join("")}</p>`;
}

/** A tree as words: children to the right of their parent, the accepted path marked. */
export function Tree({ nodes }) {
  const children = nodes.map(() => []);
  nodes.forEach((node, i) => i && children[node.parent].push(i));
  const best = (a, b) => nodes[b].p - nodes[a].p;
  const branch = (i) => html`<li key=${i}>
    <span class=${nodes[i].accepted ? "node accepted" : "node"}>
      <b>${shown(nodes[i].text)}</b> <small>${i ? percent(nodes[i].p) : "root"}</small>
      <span class="hidden">${nodes[i].accepted ? ", accepted" : ", rejected"}</span>
    </span>
    ${children[i].length > 0 && html`<ul>${children[i].sort(best).map(branch)}</ul>`}
  </li>`;
  return html`<div class="tree" tabindex="0" role="region" aria-label="Tree of this step"><ul>${branch(0)}</ul></div>`;
}
