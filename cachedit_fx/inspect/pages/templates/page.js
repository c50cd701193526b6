(() => {
  "use strict";
  const root = document.documentElement;
  const one = (selector, within = document) => within.querySelector(selector);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // Colors: the setting of the system, light, dark.
  const themes = ["auto", "light", "dark"];
  const words = { auto: "the setting of the system", light: "light", dark: "dark" };
  const button = one("#theme");
  function setTheme(theme) {
    if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
    one("span", button).textContent = theme;
    button.setAttribute("aria-label", `Colors: ${words[theme]}`);
  }
  function stored(theme) {
    try {
      if (theme) localStorage.setItem("cachedit_fx-theme", theme);
      return localStorage.getItem("cachedit_fx-theme");
    } catch { return null; }  // A page opened from a file may have no storage.
  }
  const remembered = stored();
  setTheme(themes.includes(remembered) ? remembered : "auto");
  button.addEventListener("click", () => {
    const next = themes[(themes.indexOf(root.dataset.theme || "auto") + 1) % themes.length];
    setTheme(next);
    stored(next);
  });

  // A printed page shows collapsed parts, except code.
  window.addEventListener("beforeprint", () => {
    for (const fold of all("details:not([open])")) {
      if (fold.matches(".block-code, .folded")) continue;
      fold.open = true;
      fold.dataset.printed = "";
    }
  });
  window.addEventListener("afterprint", () => {
    for (const fold of all("details[data-printed]")) { fold.open = false; delete fold.dataset.printed; }
  });

  // The cells of a table that is stacked on a narrow screen are labeled with the heads of their columns.
  for (const table of all("table.stacked")) {
    const heads = all("thead th", table).map((head) => head.textContent);
    for (const row of all("tbody tr", table)) [...row.cells].forEach((cell, i) => { cell.dataset.label = heads[i]; });
    table.classList.add("labeled");
  }

  // Boxes that scroll horizontally can be focused with the keyboard, and show that they go on.
  for (const box of all(".lane, .scroll")) {
    const outer = box.classList.contains("lane") ? box.parentElement : document.createElement("div");
    if (outer !== box.parentElement) { outer.className = "scroll-box"; box.replaceWith(outer); outer.append(box); }
    const more = document.createElement("span");
    more.className = "more";
    more.setAttribute("aria-hidden", "true");
    more.textContent = "more →";
    outer.append(more);
    box.addEventListener("scroll", () => mark(box));
  }
  function mark(box) {
    box.parentElement.classList.toggle("more-right", box.scrollWidth - box.clientWidth - box.scrollLeft > 4);
  }
  function reach() {
    for (const box of all(".lane, .scroll")) {
      const overflows = box.scrollWidth > box.clientWidth;
      if (overflows) box.tabIndex = 0; else box.removeAttribute("tabindex");
      if (box.matches(".lane")) box.closest(".chain").classList.toggle("overflows", overflows);
      mark(box);
    }
  }
  reach();
  for (const place of all(".break-line")) {  // Where a stream ends is in view.
    const lane = place.closest(".lane"), frame = lane.getBoundingClientRect();
    lane.scrollLeft += place.getBoundingClientRect().left - frame.left - frame.width / 2;
  }
  window.addEventListener("resize", reach);
  document.addEventListener("toggle", reach, true);

  const data = one("#data");
  if (!data) return;
  const blocks = JSON.parse(data.textContent);

  function writeCode(target, code) {
    target.replaceChildren();
    for (const line of code.split("\n")) {
      const at = line.lastIndexOf("  # ");
      const row = document.createElement("span");
      row.className = "line-of-code";
      row.append(at < 0 ? line : line.slice(0, at));
      if (at >= 0) {
        const remark = document.createElement("span");
        remark.className = "remark";
        remark.textContent = line.slice(at);
        row.append(remark);
      }
      target.append(row, "\n");
    }
  }

  // A block opens on both sides together, so that its lines stay aligned.
  for (const fold of all("details.block-code")) {
    fold.addEventListener("toggle", () => {
      const code = one("pre", fold);
      if (fold.open && !code.childElementCount) writeCode(code, blocks[fold.dataset.block].code);
      const other = all("details.block-code", fold.closest(".row"))
        .find((found) => found !== fold && found.dataset.block === fold.dataset.block);
      if (other && other.open !== fold.open) other.open = fold.open;
    });
  }

  // The panel of a block.
  const panel = one("#panel");
  const buttons = all(".opens");
  let shown = null;
  function open(block, takesFocus = true) {
    const found = blocks[block.dataset.block];
    if (shown) shown.classList.remove("is-open");
    shown = block;
    block.classList.add("is-open");
    one("#panel-title").textContent = found.title;
    const rows = found.facts.map(([name, value]) => {
      const row = document.createElement("div");
      const term = document.createElement("dt");
      const described = document.createElement("dd");
      term.textContent = name;
      described.textContent = value;
      row.append(term, described);
      return row;
    });
    one("#panel-facts").replaceChildren(...rows);
    writeCode(one("#panel-code"), found.code);
    panel.hidden = false;
    root.classList.add("has-panel");
    one(".panel-body").scrollTop = 0;
    for (const step of all("[data-step]", panel)) step.disabled = !neighbor(block, Number(step.dataset.step));
    reveal(block);
    if (takesFocus) one("#panel-title").focus({ preventScroll: true });
  }
  function close() {
    if (panel.hidden) return;
    panel.hidden = true;
    root.classList.remove("has-panel");
    if (!shown) return;
    shown.classList.remove("is-open");
    goTo(shown);
    shown = null;
  }
  // The blocks of a chain in their order. Those of a stack are below the drawing.
  const number = (block) => Number(block.dataset.block.slice(block.dataset.block.lastIndexOf("-") + 1));
  const chainOf = (block) => all(".opens", block.closest(".chain")).sort((a, b) => number(a) - number(b));
  function neighbor(block, step) {
    const chain = chainOf(block);
    return chain[chain.indexOf(block) + step];
  }
  function showStack(id, shows) {
    const stack = document.getElementById(id), button = one(`[aria-controls="${id}"]`);
    stack.hidden = !shows;
    button.setAttribute("aria-expanded", String(shows));
  }
  function reveal(block) {
    const stack = block.closest(".stack-blocks"), lane = block.closest(".lane");
    if (stack && stack.hidden) showStack(stack.id, true);
    const box = block.getBoundingClientRect();
    if (lane) {
      const frame = lane.getBoundingClientRect();
      const limit = panel.hidden ? frame.right : Math.min(frame.right, panel.offsetLeft || frame.right);
      if (box.left < frame.left) lane.scrollLeft -= frame.left - box.left + 40;
      else if (box.right > limit) lane.scrollLeft += box.right - limit + 40;
    }
    const floor = !panel.hidden && panel.offsetTop > 0 ? panel.offsetTop : window.innerHeight;  // A sheet on a phone.
    if (box.bottom > floor - 40) window.scrollBy(0, box.bottom - floor + 60);
    else if (box.top < 20) window.scrollBy(0, box.top - 60);
  }
  function goTo(block) {
    for (const other of chainOf(block)) other.setAttribute("tabindex", other === block ? "0" : "-1");
    reveal(block);
    block.focus({ preventScroll: true });
  }
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  for (const block of buttons) {
    block.addEventListener("click", () => open(block));
    block.addEventListener("keydown", (event) => {
      const chain = chainOf(block);
      let target = null;
      if (event.key === "Enter" || event.key === " ") open(block);
      else if (event.key in steps) target = neighbor(block, steps[event.key]) || block;
      else if (event.key === "Home") target = chain[0];
      else if (event.key === "End") target = chain[chain.length - 1];
      else return;
      event.preventDefault();
      if (target) goTo(target);
    });
  }
  for (const stack of all("[aria-controls][aria-expanded]")) {
    const toggle = () => showStack(stack.getAttribute("aria-controls"), stack.getAttribute("aria-expanded") === "false");
    stack.addEventListener("click", toggle);
    stack.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      toggle();
    });
  }
  for (const step of all("[data-step]", panel)) {
    step.addEventListener("click", () => {
      const target = shown && neighbor(shown, Number(step.dataset.step));
      if (target) open(target, step.disabled);
    });
  }
  one("#panel-close").addEventListener("click", close);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") close(); });
})();
