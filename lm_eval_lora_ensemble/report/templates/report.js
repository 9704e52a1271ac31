"use strict";
// Everything a run says reaches the page through textContent, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const make = (tag, text, className) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    return node;
  };

  // ------------------------------------------------------------------ leaderboard
  const board = document.getElementById("board");
  const body = board.tBodies[0];
  const heads = [...board.tHead.rows[1].cells];
  const metrics = [...new Set(heads.map((head) => head.dataset.metric))];
  const MAIN = ["accuracy", "nll", "ece", "mutual_information"];
  const visible = new Set(data.top.length > 2 ? MAIN : metrics);

  const showColumns = () => {
    for (const cell of board.querySelectorAll("[data-metric]")) cell.hidden = !visible.has(cell.dataset.metric);
    for (const head of board.tHead.rows[0].querySelectorAll("th.task")) head.colSpan = Math.max(1, visible.size);
    // the rule between tasks goes with the first column that shows
    const first = metrics.find((metric) => visible.has(metric));
    for (const cell of board.querySelectorAll("[data-metric]")) cell.classList.toggle("first", cell.dataset.metric === first);
  };

  const choice = (parent, text, checked, change) => {
    const label = make("label");
    const box = make("input");
    box.type = "checkbox";
    box.checked = checked;
    box.addEventListener("change", () => change(box.checked));
    label.append(box, " " + text);
    parent.append(label);
  };

  const columns = document.getElementById("columns");
  for (const metric of metrics) {
    const text = heads.find((head) => head.dataset.metric === metric).textContent.trim();
    choice(columns, text, visible.has(metric), (on) => {
      if (on) visible.add(metric); else visible.delete(metric);
      showColumns();
    });
  }
  columns.hidden = false;

  const hiddenKinds = new Set();
  const showKinds = () => {
    for (const row of body.rows) row.hidden = hiddenKinds.has(row.dataset.kind);
  };
  const kinds = [...new Set([...body.rows].map((row) => row.dataset.kind))];
  if (kinds.length > 1) {
    const parent = document.getElementById("kinds");
    for (const kind of kinds) {
      choice(parent, kind, true, (on) => {
        if (on) hiddenKinds.delete(kind); else hiddenKinds.add(kind);
        showKinds();
      });
    }
    parent.hidden = false;
  }

  const childrenOf = (row) => {
    const found = [];
    for (let next = row.nextElementSibling; next && next.classList.contains("subtask"); next = next.nextElementSibling) found.push(next);
    return found;
  };

  const sortBy = (index) => {
    const head = heads[index];
    const descending = head.getAttribute("aria-sort") !== "descending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const value = (row) => {
      const cell = row.cells[index + 1];
      return "value" in cell.dataset ? Number(cell.dataset.value) : NaN;
    };
    const rows = [...body.rows].filter((row) => !row.classList.contains("subtask")).map((row) => [row, childrenOf(row)]);
    rows.sort(([a], [b]) => {
      const x = value(a), y = value(b);
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return descending ? y - x : x - y;
    });
    for (const [row, below] of rows) body.append(row, ...below);
  };
  heads.forEach((head, index) => head.querySelector("button").addEventListener("click", () => sortBy(index)));

  const subtaskRow = (subtask, entry, kind, cells) => {
    const row = make("tr", undefined, "subtask");
    row.dataset.kind = kind;
    const name = make("th", `${subtask.task} (${subtask.n})`, "name");
    name.scope = "row";
    row.append(name);
    for (const top of data.top) {
      metrics.forEach((metric, index) => {
        const cell = make("td");
        cell.dataset.metric = metric;
        if (subtask.parents.includes(top)) {
          const [value, interval, best] = cells[index];
          cell.append(make("span", value, "value"));
          if (interval) cell.append(make("span", interval, "interval"));
          if (best) cell.classList.add("best");
        }
        row.append(cell);
      });
    }
    return row;
  };

  if (data.subtasks.length) {
    for (const row of [...body.rows]) {
      const entry = Number(row.dataset.entry), kind = row.dataset.kind;
      const below = () => data.subtasks.flatMap((subtask) => subtask.rows
        .filter(([e, k]) => e === entry && k === kind)
        .map(([, , cells]) => subtaskRow(subtask, entry, kind, cells)));
      if (!data.subtasks.some((subtask) => subtask.rows.some(([e, k]) => e === entry && k === kind))) continue;
      const button = make("button", "+", "expand");
      button.type = "button";
      button.setAttribute("aria-expanded", "false");
      button.setAttribute("aria-label", `Tasks of ${row.cells[0].textContent}`);
      button.addEventListener("click", () => {
        const open = button.getAttribute("aria-expanded") === "true";
        if (open) childrenOf(row).forEach((child) => child.remove());
        else row.after(...below());
        button.setAttribute("aria-expanded", String(!open));
        button.textContent = open ? "+" : "−";
        showColumns();
      });
      row.cells[0].prepend(button);
    }
  }
  showColumns();

  // figures far down the page are decoded when they come near, but paper needs them all
  window.addEventListener("beforeprint", () => {
    for (const image of document.images) image.loading = "eager";
  });

  // ------------------------------------------------------------------ documents
  const PAGE = 20;
  const [ENTRY, TASK, NUMBER, QUESTION, CHOICES, GOLD, MIXTURE, MEMBERS, ENTROPY, INFORMATION, REASONS] = Array(11).keys();
  const argmax = (values) => values.indexOf(Math.max(...values));
  const isWrong = (d) => d[GOLD] >= 0 && argmax(d[MIXTURE]) !== d[GOLD];
  const isRight = (d) => d[GOLD] >= 0 && argmax(d[MIXTURE]) === d[GOLD];
  const confidence = (d) => Math.max(...d[MIXTURE]);
  const orders = [(d) => d[ENTROPY], confidence, (d) => d[INFORMATION]];
  const byId = (id) => document.getElementById(id);
  const filters = { run: byId("filter-run"), task: byId("filter-task"), reason: byId("filter-reason"), answer: byId("filter-answer") };
  const option = (select, value, text) => {
    const node = make("option", text);
    node.value = value;
    select.append(node);
  };
  option(filters.run, "", "all");
  [...new Set(data.documents.map((d) => d[ENTRY]))].forEach((entry) => option(filters.run, entry, data.runs[entry]));
  option(filters.task, "", "all");
  [...new Set(data.documents.map((d) => d[TASK]))].sort().forEach((task) => option(filters.task, task, task));
  data.reasons.forEach((reason, index) => {
    if (data.documents.some((d) => d[REASONS].includes(index))) option(filters.reason, index, reason);
  });

  let found = [], page = 0;
  const card = (d) => {
    const item = make("li");
    const right = isWrong(d) ? "wrong" : isRight(d) ? "right" : "gold unknown";
    item.append(make("div", `${data.runs[d[ENTRY]]} · ${d[TASK]} · document ${d[NUMBER]} · ${right} · entropy ${d[ENTROPY].toFixed(3)} · MI ${d[INFORMATION].toFixed(3)} nats`, "where"));
    item.append(make("div", d[QUESTION] || "(the samples file holds no text)", "question"));
    const answers = make("div", undefined, "answers");
    d[MIXTURE].forEach((percent, c) => {
      const text = d[CHOICES][c] || `choice ${c + 1}`;
      answers.append(make("div", c === d[GOLD] ? `✓ ${text}` : text, c === d[GOLD] ? "text gold" : "text"));
      const bar = make("div", undefined, "bar");
      const length = make("i");
      length.style.width = `${(percent * 0.055).toFixed(2)}rem`;
      bar.append(length, percent.toFixed(1));
      answers.append(bar, make("div", d[MEMBERS].length > 1 ? d[MEMBERS].map((m) => m[c].toFixed(0)).join(" · ") : "", "members"));
    });
    item.append(answers);
    return item;
  };
  const draw = () => {
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    byId("cards").replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map(card));
    byId("count").textContent = `${found.length} of ${data.documents.length} documents`;
    byId("page").textContent = `page ${page + 1} of ${pages}`;
    byId("previous").disabled = page === 0;
    byId("next").disabled = page + 1 >= pages;
  };
  const filter = () => {
    const reason = Number(filters.reason.value);
    found = data.documents.filter((d) =>
      (!filters.run.value || d[ENTRY] === Number(filters.run.value)) &&
      (!filters.task.value || d[TASK] === filters.task.value) &&
      d[REASONS].includes(reason) &&
      (!filters.answer.value || (filters.answer.value === "right" ? isRight(d) : isWrong(d))));
    found.sort((a, b) => orders[reason](b) - orders[reason](a));
    page = 0;
    draw();
  };
  for (const select of Object.values(filters)) select.addEventListener("change", filter);
  byId("previous").addEventListener("click", () => { page -= 1; draw(); });
  byId("next").addEventListener("click", () => { page += 1; draw(); });
  byId("filters").hidden = false;
  byId("pages").hidden = false;
  filter();
})();
