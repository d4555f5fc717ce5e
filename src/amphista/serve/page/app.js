// The page: a chat whose answers show who guessed each token. No library; texts become text nodes and nothing else.

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const history = []; // turns: {text, answer: {text, ids, seed, asked}}
let running = null; // the AbortController of the answer that comes

function element(kind, { text, ...attributes } = {}, children = []) {
  const node = document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  node.append(...children);
  return node;
}

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function failure(response) {
  const body = await response.json().catch(() => null);
  return new Error(body?.error?.message ?? `The server answered ${response.status}.`);
}

async function* events(body, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST", headers: headers(), body: JSON.stringify(body), signal,
  });
  if (!response.ok) throw await failure(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const line = block.split("\n").find((one) => one.startsWith("data: "));
      if (!line || line === "data: [DONE]") continue;
      const data = JSON.parse(line.slice(6));
      if (data.error) throw new Error(data.error.message);
      yield data;
    }
  }
}

// -- what is asked ---------------------------------------------------------------------------------------------------

function settings() {
  const asked = { stream: true, stream_options: { include_usage: true }, return_token_ids: true };
  for (const name of ["temperature", "top_p", "top_k", "max_tokens", "seed"]) {
    if ($(name).value !== "") asked[name] = Number($(name).value);
  }
  if ($("schema").value.trim()) {
    let schema;
    try { schema = JSON.parse($("schema").value); } catch { throw new Error("The JSON schema is no JSON."); }
    asked.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  }
  return asked;
}

function messages(turns) {
  const system = $("system").value.trim();
  const said = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns) {
    said.push({ role: "user", content: turn.text });
    if (turn.answer) said.push({ role: "assistant", content: turn.answer.text });
  }
  return said;
}

// -- an answer as it comes -------------------------------------------------------------------------------------------

const counted = (number, what) => `${number} ${what}${number === 1 ? "" : "s"}`;

function showStep(holder, step, number) {
  const tokens = step.tokens.filter((token) => token.text);
  if (!tokens.length) return;
  const guessed = step.tokens.filter((token) => token.source !== "target").length;
  const label = `Step ${number}: ${counted(step.tokens.length, "token")}, ${guessed} guessed`;
  const first = !holder.querySelector(".step");
  const span = element("span", { class: "step", tabindex: first ? 0 : -1, "aria-label": label }, tokens.map(
    (token) => element("span", { class: `token ${token.source}`, text: token.text })));
  const show = () => showTree(step, label);
  span.addEventListener("mouseenter", show);
  span.addEventListener("focus", show);
  holder.append(span);
}

function moveFocus(event) {
  const towards = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
  const next = towards && event.target.classList.contains("step") && event.target[towards];
  if (!next) return;
  event.preventDefault();
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function figures(state) {
  const seconds = (performance.now() - state.first) / 1000;
  const { ids, steps, usage, timings, load } = state;
  const parts = [counted(ids.length, "token")];
  const rate = timings?.predicted_per_second ?? (seconds > 0.05 ? (ids.length - 1) / seconds : null);
  if (rate) parts.push(`${rate.toFixed(1)} tokens/s`);
  if (steps > 1) parts.push(`${((ids.length - 1) / (steps - 1)).toFixed(2)} tokens a step`);
  parts.push(`first after ${Math.round(state.first - state.started)} ms`);
  if (usage) parts.push(`${usage.prompt_tokens_details.cached_tokens} of ${usage.prompt_tokens} prompt tokens known`);
  if (load) parts.push(`${counted(load.running, "request")} running`);
  if (load?.node_price != null) parts.push(`a node costs ${load.node_price.toFixed(2)} tokens`);
  return parts.join(" · ");
}

// Reads an answer into `holder`; returns what there is of it when it ends or is stopped.
async function answer(asked, holder, told) {
  const state = { ids: [], text: "", steps: 0, started: performance.now(), first: 0, seed: asked.seed };
  running = new AbortController();
  $("send").hidden = true;
  $("stop").hidden = false;
  try {
    for await (const chunk of events({ ...asked, amphista: { trace: true, ...asked.amphista } }, running.signal)) {
      state.seed = chunk.seed ?? state.seed;
      if (chunk.usage) Object.assign(state, { usage: chunk.usage, timings: chunk.timings });
      for (const choice of chunk.choices) {
        state.text += choice.delta.content ?? "";
        state.ids.push(...(choice.token_ids ?? []));
        state.load = choice.amphista ?? state.load;
        for (const step of choice.amphista?.steps ?? []) showStep(holder, step, ++state.steps);
        if (state.ids.length && !state.first) state.first = performance.now();
      }
      if (state.first) told.textContent = figures(state);
      holder.lastElementChild?.scrollIntoView({ block: "nearest" });
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    told.append(" · stopped");
    state.stopped = true;
  } finally {
    running = null;
    $("send").hidden = false;
    $("stop").hidden = true;
  }
  return state;
}

async function guarded(work) {
  $("error").hidden = true;
  try { await work(); } catch (error) {
    $("error").textContent = error.message;
    $("error").hidden = false;
  }
}

function block(who) {
  const holder = element("div", { class: "text", role: "group", "aria-label": who });
  holder.addEventListener("keydown", moveFocus);
  const told = element("p", { class: "figures" });
  return { holder, told };
}

// Asks for the answer to the last turn, and offers what can be done with it.
async function ask(turn) {
  const asked = { ...settings(), messages: messages([...history.slice(0, history.indexOf(turn)), { text: turn.text }]) };
  turn.article?.remove();
  const { holder, told } = block("Answer");
  turn.article = element("article", { class: "assistant" }, [holder, told]);
  $("messages").append(turn.article);
  const state = await answer(asked, holder, told);
  turn.answer = { ...state, asked: { ...asked, seed: state.seed } };
  const again = element("button", { type: "button", text: "Regenerate" });
  again.addEventListener("click", () => !running && guarded(() => ask(turn)));
  const compare = element("button", { type: "button", text: "Compare with plain decoding" });
  compare.addEventListener("click", () => !running && guarded(() => comparison(turn)));
  for (const old of document.querySelectorAll(".actions")) old.remove();
  turn.article.append(element("p", { class: "actions" }, [again, compare]));
}

async function comparison(turn) {
  turn.article.querySelector(".plain")?.remove();
  const { holder, told } = block("The same, decoded plainly");
  const verdict = element("p", { class: "verdict", role: "status" });
  const part = element("section", { class: "plain" }, [
    element("h2", { text: "Decoded plainly, with the same seed" }), holder, told, verdict]);
  turn.article.insertBefore(part, turn.article.querySelector(".actions"));
  const state = await answer({ ...turn.answer.asked, amphista: { drafter: "none" } }, holder, told);
  const mine = turn.answer.ids, length = turn.answer.stopped || state.stopped ? Math.min(mine.length, state.ids.length) : Math.max(mine.length, state.ids.length);
  const same = Array.from({ length }).every((_, at) => mine[at] === state.ids[at]);
  const rates = [turn.answer, state].map((one) => one.timings?.predicted_per_second);
  const ratio = rates.every(Boolean) ? ` ${(rates[0] / rates[1]).toFixed(2)} times as fast.` : "";
  verdict.textContent = `Same tokens: ${same ? "yes" : "no"}.${ratio}`;
}

// -- the tree of a step ----------------------------------------------------------------------------------------------

function drawn(kind, attributes, text) {
  const node = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function shown(text) {
  const plain = text.replaceAll("\n", "⏎").replaceAll(" ", "␣");
  return plain.length > 6 ? `${plain.slice(0, 5)}…` : plain;
}

function showTree(step, label) {
  const milliseconds = step.ms ? `, ${step.ms.toFixed(1)} ms` : "";
  $("step-text").textContent = `${label}; ${counted(step.nodes.length, "node")} checked${milliseconds}.`;
  $("step-tree").replaceChildren(...(step.nodes.length ? [tree(step)] : []));
}

function tree(step) {
  const { nodes } = step, accepted = new Set(step.path), WIDTH = 92, HEIGHT = 30;
  const children = nodes.map(() => []);
  nodes.forEach((node, at) => node.parent >= 0 && children[node.parent].push(at));
  const places = [];
  let row = 0;
  const place = (at, depth) => {
    const below = children[at].map((child) => place(child, depth + 1));
    places[at] = { x: depth * WIDTH, y: below.length ? below[0].y : row++ * HEIGHT };
    return places[at];
  };
  place(0, 0);
  const width = Math.max(...places.map(({ x }) => x)) + WIDTH, height = row * HEIGHT;
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": "Tree of this step" });
  nodes.forEach((node, at) => {
    const { x, y } = places[at], kind = accepted.has(at) ? "accepted" : "refused";
    if (node.parent >= 0) {
      const from = places[node.parent];
      const start = `${from.x + WIDTH - 16} ${from.y + HEIGHT / 2}`, end = `${x} ${y + HEIGHT / 2}`;
      svg.append(drawn("path", { d: `M ${start} C ${x - 6} ${from.y + HEIGHT / 2} ${x - 10} ${y + HEIGHT / 2} ${end}`, class: kind }));
    }
  });
  nodes.forEach((node, at) => {
    const { x, y } = places[at], kind = accepted.has(at) ? "accepted" : "refused";
    const group = drawn("g", { class: `node ${node.source} ${kind}` });
    group.append(
      drawn("title", {}, `${node.text} (p ${node.p}, ${node.source}${kind === "accepted" ? ", accepted" : ""})`),
      drawn("rect", { x, y: y + 3, width: WIDTH - 16, height: HEIGHT - 6, rx: 5 }),
      drawn("text", { x: x + 6, y: y + HEIGHT / 2 + 4 }, shown(node.text)),
      drawn("text", { x: x + WIDTH - 20, y: y + HEIGHT / 2 + 4, class: "p" }, at ? node.p.toFixed(2) : ""));
    svg.append(group);
  });
  return svg;
}

// -- begin -----------------------------------------------------------------------------------------------------------

async function greet() {
  const response = await fetch("v1/models", { headers: headers() });
  if (response.status === 401) {
    $("settings").open = true;
    throw new Error("This server wants an API key: enter it under Settings.");
  }
  if (!response.ok) throw await failure(response);
  $("model").textContent = (await response.json()).data[0].id;
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || running) return;
  guarded(async () => {
    settings(); // what is wrong with them is said before anything happens
    $("empty").hidden = true;
    $("prompt").value = "";
    const turn = { text };
    history.push(turn);
    $("messages").append(element("article", { class: "user", text }));
    await ask(turn);
  });
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
$("key").value = sessionStorage.getItem("key") ?? "";
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value);
  guarded(greet);
});
$("settings").open = matchMedia("(min-width: 60rem)").matches;
guarded(greet);
