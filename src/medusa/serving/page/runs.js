// Recorded runs: the steps of an answer with the time of each, and what can be said of them.

/** Record an answer as {steps: [{at, tokens, pieces, ms, depth, nodes, logprobs}], text, reason}; `at` is ms after the first. */
export async function record(answer, onStep) {
  const run = { steps: [], text: "", reason: null };
  let first = null;
  for await (const each of answer) {
    run.text += each.text;
    run.reason = each.reason ?? run.reason;
    if (!each.trace) continue;
    first ??= each.at;
    run.steps.push({ ...each.trace, at: each.at - first });
    onStep?.({ ...run });
  }
  return run;
}

export const tokens = (run) => run.steps.flatMap((step) => step.tokens);

/** Tokens per second after the first step, whose time is the prompt's. */
export function speed(run) {
  const last = run.steps.at(-1);
  if (!last || !last.at) return null;
  return ((tokens(run).length - run.steps[0].tokens.length) / last.at) * 1000;
}

export const perStep = (run) => (run.steps.length ? tokens(run).length / run.steps.length : null);

/** Whether some steps of these runs were compiled and others were not. */
export const halfCompiled = (runs) => new Set(Object.values(runs).flatMap((run) => run.steps.map((step) => step.compiled))).size > 1;

/** Where two runs differ: null if nowhere, else {place, words}. */
export function difference(a, b) {
  const [x, y] = [tokens(a), tokens(b)];
  if (x.length === y.length && x.every((token, i) => token === y[i])) return null;
  const place = [...x, null].findIndex((token, i) => token !== y[i]);
  const words = [a, b].map((run) => run.steps.flatMap((step) => step.pieces)[place] ?? "the end");
  return { place, words };
}

export const seen = (run, at) => (at == null ? run.steps : run.steps.filter((step) => step.at <= at));
export const percent = (p) => (p >= 0.995 ? "100%" : p >= 0.01 ? `${Math.round(p * 100)}%` : p > 0 ? "<1%" : "0%");
export const shown = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ +| +$/g, (s) => "␣".repeat(s.length)) || "∅";
