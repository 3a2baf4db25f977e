// The page: overview, curves, rollouts, one rollout (beside another).

const data = JSON.parse(document.getElementById("data").textContent);
const rollouts = data.runs.flatMap((run, r) =>
  run.rollouts.map((row) => ({...row, run: r})));
const state = {tab: "overview", open: null, other: null, measure: 0,
  sort: "step", down: false, page: 0, metrics: null,
  filter: {run: "", from: "", step: "", right: "", searches: "", hops: "", text: ""}};
const main = document.getElementById("main");
const PAGE = 100;

function show() {
  remember();
  const tabs = [["overview", "Overview"], ["curves", "Curves"],
    ["rollouts", `Rollouts (${rollouts.length})`]];
  document.getElementById("header").replaceChildren(
    element("h1", {}, "stepsearch_jax"),
    ...tabs.map(([key, text]) => element("button", {
      "aria-selected": String(state.tab === key && state.open === null),
      onclick: () => { state.tab = key; state.open = null; show(); }}, text)),
    element("span", {class: "soft"},
      "keys: 1 2 3 tabs, / filter, j k next and previous, Esc back"));
  const draw = state.open !== null ? drawOne : {overview: drawOverview,
    curves: drawCurves, rollouts: drawTable}[state.tab];
  main.replaceChildren(...draw());
}

// The address holds what is shown: a reload, or a link, shows it again.
function remember() {
  const query = new URLSearchParams();
  const note = (key, value, usual) => {
    if (value !== usual) query.set(key, value);
  };
  Object.entries(state.filter).forEach(([key, value]) => note(key, value, ""));
  note("color", state.measure, 0);
  note("sort", state.sort, "step");
  note("down", state.down, false);
  note("curves", state.metrics && state.metrics.join(" "), null);
  const open = [state.tab, state.open, state.other].filter((x) => x !== null);
  const text = String(query);
  try {
    history.replaceState(null, "", "#" + open.join("/") +
      (text && "?" + text));
  } catch (error) {
    if (error.name !== "SecurityError") throw error;
    // A page inside another one, such as a notebook, has no address.
  }
}

function fromAddress() {
  const [place, text] = location.hash.slice(1).split("?");
  const [tab, open, other] = place.split("/");
  if (["overview", "curves", "rollouts"].includes(tab)) state.tab = tab;
  const index = (text) => rollouts[text] ? Number(text) : null;
  state.open = index(open);
  state.other = index(other);
  const query = new URLSearchParams(text);
  Object.keys(state.filter).forEach((key) => {
    state.filter[key] = query.get(key) || ""; });
  const color = Number(query.get("color"));
  state.measure = data.measures[color] ? color : 0;
  state.sort = query.get("sort") || "step";
  state.down = query.has("down");
  const curves = query.get("curves");
  state.metrics = curves === null ? null : curves.split(" ");
}

const typing = (node) => ["INPUT", "SELECT"].includes(node.tagName);

// A live page loads itself again, but not under the hands of a typist.
function reloadLater(seconds) {
  setTimeout(() => {
    if (typing(document.activeElement)) reloadLater(seconds);
    else location.reload();
  }, 1000 * seconds);
}

function drawOverview() {
  const parts = [];
  const names = data.runs.map((run) => run.name);
  const rows = (pick, onlyDifferent) => {
    const keys = [...new Set(data.runs.flatMap((r) => Object.keys(pick(r))))];
    return keys.map((key) => {
      const values = data.runs.map((run) => pick(run)[key]);
      const differs = new Set(values.map(String)).size > 1;
      if (onlyDifferent && !differs) return null;
      return element("tr", {class: differs && names.length > 1 ?
        "differs" : null}, element("th", {scope: "row"}, key),
      ...values.map((v) => element("td", {}, number(v, 4))));
    }).filter(Boolean);
  };
  const table = (title, body) => [element("h2", {}, title), element("table",
    {}, element("thead", {}, element("tr", {}, element("th", {}, ""),
      ...names.map((n) => element("th", {scope: "col"}, n)))),
    element("tbody", {}, ...body))];
  parts.push(...table("Summary", rows((run) => run.summary)));
  if (names.length > 1) {
    parts.push(...table("Settings that differ",
      rows((run) => run.settings, true)));
  }
  parts.push(element("details", {}, element("summary", {}, "All settings"),
    ...table("", rows((run) => run.settings))));
  return parts;
}

function drawCurves() {
  const all = [...new Set(data.runs.flatMap((r) => Object.keys(r.curves)))]
    .sort();
  const chosen = state.metrics || data.first.filter((m) => all.includes(m));
  const pick = choice("add a curve", [["", "choose"],
    ...all.filter((m) => !chosen.includes(m)).map((m) => [m, m])], "",
  (name) => { state.metrics = [...chosen, name]; show(); });
  const legend = element("div", {class: "legend"}, ...data.runs.map((run, i) =>
    element("span", {style: `color:${COLORS[i % 7]}`},
      `${["\u2501\u2501", "\u2505\u2505", "\u2508\u2508", "\u2509\u2509"][i % 4]
      } ${run.name}`)));
  const charts = chosen.map((metric) => chart(metric, data.runs
    .map((run, i) => ({name: run.name, color: COLORS[i % 7],
      dash: DASHES[i % 4], points: run.curves[metric] || []}))
    .filter((line) => line.points.length)));
  return [element("div", {class: "filters"}, pick, legend),
    element("div", {class: "charts"}, ...charts)];
}

function matches(row) {
  const f = state.filter;
  return (f.run === "" || row.run === Number(f.run)) &&
    (f.from === "" || row.from === f.from) &&
    (f.step === "" || row.step === Number(f.step)) &&
    (f.right === "" || (row.em === 1) === (f.right === "right")) &&
    (f.searches === "" || row.searches === Number(f.searches)) &&
    (f.hops === "" || row.hops === Number(f.hops)) &&
    (f.text === "" || (row.question + " " + row.texts.join("")).toLowerCase()
      .includes(f.text.toLowerCase()));
}

function found() {
  const order = rollouts.map((row, i) => i).filter((i) => matches(rollouts[i]));
  const key = (i) => rollouts[i][state.sort];
  order.sort((a, b) => (key(a) > key(b)) - (key(a) < key(b)) || a - b);
  return state.down ? order.reverse() : order;
}

function drawTable() {
  const f = state.filter;
  const values = (key) => [["", "all"], ...[...new Set(rollouts.map((r) =>
    r[key]))].filter((v) => v !== null).sort((a, b) => a - b)
    .map((v) => [v, v])];
  const set = (key) => (value) => { f[key] = value; state.page = 0; show(); };
  const text = element("input", {id: "text", type: "search", value: f.text,
    placeholder: "text", "aria-label": "text in question or rollout",
    onchange: (event) => set("text")(event.target.value)});
  const filters = element("div", {class: "filters"},
    choice("run", [["", "all"], ...data.runs.map((r, i) => [i, r.name])],
      f.run, set("run")),
    choice("from", [["", "all"], ["training", "training"],
      ["evaluation", "evaluation"]], f.from, set("from")),
    choice("step", values("step"), f.step, set("step")),
    choice("answer", [["", "all"], ["right", "right"], ["wrong", "wrong"]],
      f.right, set("right")),
    choice("searches", values("searches"), f.searches, set("searches")),
    choice("hops", values("hops"), f.hops, set("hops")), text);
  const columns = ["run", "from", "step", "question", "prediction", "em", "reward",
    "searches", "hops"];
  const head = columns.map((name) => element("th", {scope: "col",
    "aria-sort": state.sort !== name ? null :
      state.down ? "descending" : "ascending"},
  element("button", {onclick: () => {
    state.down = state.sort === name && !state.down;
    state.sort = name; show(); }}, name +
    (state.sort === name ? (state.down ? " \u25be" : " \u25b4") : ""))));
  const order = found();
  const from = state.page * PAGE;
  const body = order.slice(from, from + PAGE).map((i) => {
    const row = rollouts[i];
    const open = () => { state.open = i; state.other = null; show(); };
    return element("tr", {tabindex: 0, "data-rollout": i, onclick: open,
      onkeydown: (event) => { if (event.key === "Enter") open(); }},
    ...columns.map((name) => element("td", {class: name === "em" ?
      (row.em === 1 ? "right" : "wrong") :
      typeof row[name] === "number" ? "number" : null},
    name === "run" ? data.runs[row.run].name :
      name === "em" ? (row.em === 1 ? "\u2713 right" : "\u2717 wrong") :
        number(row[name]))));
  });
  const move = (by) => () => { state.page += by; show(); };
  return [filters,
    element("p", {class: "soft", id: "count"},
      `${order.length} of ${rollouts.length} rollouts` + (data.left_out ?
        `; ${data.left_out} more are not in this page` : "")),
    element("table", {}, element("thead", {}, element("tr", {}, ...head)),
      element("tbody", {}, ...body)),
    element("p", {},
      state.page ? element("button", {onclick: move(-1)}, "previous") : "",
      from + PAGE < order.length ?
        element("button", {onclick: move(1)}, "next") : "")];
}

function drawOne() {
  const row = rollouts[state.open];
  const same = rollouts.map((r, i) => i).filter((i) => i !== state.open &&
    rollouts[i].id === row.id);
  const label = (i) => `${data.runs[rollouts[i].run].name}, ${
    rollouts[i].place}`;
  const bar = element("div", {class: "filters"},
    element("button", {onclick: () => { state.open = null;
      state.tab = "rollouts"; show(); }}, "back"),
    choice("color by", data.measures.map((m, i) => [i, m]), state.measure,
      (value) => { state.measure = Number(value); show(); }),
    choice("beside", [["", same.length ? "none" :
      "no other rollout of this question"], ...same.map((i) => [i, label(i)])],
    state.other === null ? "" : state.other, (value) => {
      state.other = value === "" ? null : Number(value); show(); }));
  const shown = [state.open, state.other].filter((i) => i !== null);
  return [bar, element("div", {class: shown.length > 1 ? "pair two" : "pair"},
    ...shown.map((i) => drawRollout(rollouts[i], label(i))))];
}

function drawRollout(row, label) {
  const column = row.values.map((v) => v[state.measure]).filter((x) =>
    typeof x === "number").map(Math.abs).sort((a, b) => a - b);
  const largest = column[Math.floor(.98 * (column.length - 1))] ||
    column[column.length - 1] || 0;
  const turns = row.turns.map((turn, t) => drawTurn(row, turn, t, largest));
  const right = row.em === 1;
  return element("article", {},
    element("h2", {}, row.question),
    element("p", {}, `${label}. Wanted: ${row.answers.join(" / ")}. Answered: `,
      element("b", {class: right ? "right" : "wrong"},
        row.prediction === null ? "nothing" : row.prediction,
        right ? " \u2713" : " \u2717"),
      `. Reward ${number(row.reward)}, of it outcome ${number(row.outcome)}. `,
      `Ended by ${row.stop_reason}.`),
    column.length ? "" : element("p", {class: "soft"},
      `${data.measures[state.measure]}: not known of this rollout`),
    element("details", {}, element("summary", {}, "prompt"),
      element("div", {class: "text"}, row.prompt)), ...turns);
}

function drawTurn(row, turn, t, largest) {
  const text = element("div", {class: "text"});
  row.texts.forEach((piece, i) => {
    if (row.turn_of[i] !== t || !row.values[i].length) return;
    const values = row.values[i];
    const known = (k) => values[k] !== null;
    const notes = data.measures.map((m, k) => `${m} ${number(values[k])}`)
      .filter((note, k) => known(k));
    const paid = row.start + i === turn.position && turn.action === "search";
    if (paid) {
      notes.unshift(`gain ${number(turn.gain)}, redundancy ${
        number(turn.redundancy)}, key ${number(turn.key)}`);
    }
    text.append(element("span", {class: "token" + (paid ? " paid" : "") +
      (known(state.measure) ? "" : " absent"),
      style: `background:${shade(values[state.measure], largest)}`,
      title: notes.join("\n")}, piece));
  });
  const earned = element("p", {class: "soft"}, turn.action === "search" ?
    `search: gain ${number(turn.gain)} \u2212 redundancy ${
      number(turn.redundancy)}, key ${number(turn.key)}; paid ${
      number(turn.paid)}` : `${turn.action}: paid ${number(turn.paid)}`);
  const documents = turn.documents.map((doc) => element("div", {
    class: doc.support ? "document support" : "document"},
  element("b", {}, doc.title), doc.support ?
    element("span", {class: "tag"}, "support") : "",
  doc.repeated ? element("span", {class: "tag"}, "shown before") : "",
  element("div", {}, doc.text)));
  return element("section", {class: "turn"}, text, earned, ...documents);
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    state.open = null; show();
  } else if (!typing(event.target) && event.key === "/") {
    event.preventDefault(); state.tab = "rollouts"; state.open = null; show();
    document.getElementById("text").focus();
  } else if (!typing(event.target) && ["1", "2", "3"].includes(event.key)) {
    state.tab = ["overview", "curves", "rollouts"][event.key - 1];
    state.open = null; show();
  } else if (!typing(event.target) && ["j", "k"].includes(event.key) &&
      state.open !== null) {
    const order = found(), at = order.indexOf(state.open);
    const next = order[at + (event.key === "j" ? 1 : -1)];
    if (next !== undefined) { state.open = next; state.other = null; show(); }
  }
});
window.addEventListener("hashchange", () => { fromAddress(); show(); });
if (Number(main.dataset.refresh)) reloadLater(Number(main.dataset.refresh));
fromAddress();
show();
