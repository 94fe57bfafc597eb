// Live: what the server does now, from its metrics, once a second.
import { html, useEffect, useState } from "./preact.js";
import { metrics } from "./api.js";
import { percent } from "./runs.js";

const KEPT = 60; // readings in the chart

export function Live() {
  const [readings, setReadings] = useState([]); // [{at, found}]
  const [said, setSaid] = useState("");
  useEffect(() => {
    let gone = false, timer;
    const read = async () => {
      try {
        const found = await metrics();
        if (!gone) setReadings((before) => [...before, { at: performance.now(), found }].slice(-KEPT)), setSaid("");
      } catch (error) {
        if (!gone) setReadings([]), setSaid(`No figures: ${error.message}.`);
      }
      if (!gone) timer = setTimeout(read, 1000);
    };
    read();
    return () => ((gone = true), clearTimeout(timer));
  }, []);
  const now = readings.at(-1)?.found ?? {};
  const value = (name) => now[name] ?? 0;
  const rates = readings.slice(1).map((each, i) => {
    const before = readings[i];
    const more = each.found["vllm:generation_tokens_total"] - before.found["vllm:generation_tokens_total"];
    return (Math.max(0, more) / (each.at - before.at)) * 1000; // fewer: the server was restarted
  });
  const steps = value("medusa:tokens_per_step_count");
  const box = (label, shown, id) => html`<div class="score"><b data-live=${id}>${shown}</b><span>${label}</span></div>`;
  return html`<section aria-label="Live">
    <p class="said" role="status">${said}</p>
    <div class="scores">
      ${box("running", value("vllm:num_requests_running"), "running")} ${box("waiting", value("vllm:num_requests_waiting"), "waiting")}
      ${box("tokens/s now", (rates.at(-1) ?? 0).toFixed(1), "speed")}
      ${box("tokens a step", steps ? (value("medusa:tokens_per_step_sum") / steps).toFixed(2) : "–", "rate")}
      ${box("tree in use", value("medusa:tree_nodes") > 1 ? `${value("medusa:tree_nodes")} nodes` : "plain", "tree")}
      ${box("slots", value("medusa:slots"), "slots")} ${box("of the cache", percent(value("vllm:kv_cache_usage_perc")), "cache")}
    </div>
    <${Chart} rates=${rates} />
    <${Depths} now=${now} />
    <p class="note">Tokens a step and acceptance count since the server started; the chart shows the last minute.</p>
  </section>`;
}

function Chart({ rates }) {
  const most = Math.max(1, ...rates);
  const points = rates.map((rate, i) => `${((i + KEPT - rates.length) / (KEPT - 1)) * 600},${100 - (rate / most) * 95}`).join(" ");
  return html`<figure><figcaption>Tokens per second (at most ${most.toFixed(0)})</figcaption>
    <svg viewBox="0 0 600 100" preserveAspectRatio="none" role="img" aria-label="Tokens per second in the last minute">
      <polyline points=${points} fill="none" stroke="currentColor" stroke-width="2" vector-effect="non-scaling-stroke" /></svg></figure>`;
}

function Depths({ now }) {
  const drafts = now["vllm:spec_decode_num_drafts_total"] ?? 0;
  const name = "vllm:spec_decode_num_accepted_tokens_per_pos_total#";
  const depths = Object.keys(now).filter((each) => each.startsWith(name)).sort((a, b) => a.split("#")[1] - b.split("#")[1]);
  if (!drafts || !depths.length) return html`<p>No drafts yet.</p>`;
  return html`<table><caption>Steps whose path reached each depth</caption>
    <thead><tr><th scope="col">depth</th><th scope="col">share</th><th scope="col"><span class="hidden">bar</span></th></tr></thead>
    <tbody>${depths.map((each, i) => html`<tr key=${each}><td>${i + 1}</td><td>${percent(now[each] / drafts)}</td>
      <td><meter max="1" value=${now[each] / drafts} aria-label=${`depth ${i + 1}`}></meter></td></tr>`)}</tbody></table>`;
}
