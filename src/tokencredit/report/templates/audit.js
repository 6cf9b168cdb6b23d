"use strict";
// One response at a time, its tokens once per method, one colour scale for all of them. Text only, never markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const element = (name) => document.getElementById(name);
  const responses = data.responses, methods = data.methods;
  const shown = new Set(methods.map((_, index) => index));
  let current = 0, view = "advantage", spans = [];

  // Numbers travel as whole multiples of a step, one or two bytes each.
  const decode = (text, step, length) => {
    if (typeof text === "number") return new Float32Array(length).fill(text); // one number for all tokens
    const raw = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const whole = data.bytes === 2 ? new Int16Array(raw.buffer) : new Int8Array(raw.buffer);
    return Float32Array.from(whole, (value) => value * step);
  };
  const cache = new Map();
  const response = (index) => {
    if (cache.has(index)) return cache.get(index);
    const given = responses[index];
    const made = {
      ...given,
      texts: given.text === "" && given.length === 0 ? [] : given.text.split("\u0001"),
      hidden: new Set(given.unchosen),
      credit: given.credit.map((text, method) => decode(text, methods[method].step, given.length)),
      fields: Object.fromEntries(Object.entries(given.fields).map(([name, text]) => [name, decode(text, data.fields[name].step, given.length)])),
    };
    if (cache.size > 8) cache.clear();
    cache.set(index, made);
    return made;
  };

  // Value and colour strength of a token, in [-1, 1], under the view that is chosen.
  const valueOf = (item, method, place) => {
    const credit = item.credit[method][place];
    if (view === "advantage") return [credit, credit / data.scale];
    if (view === "weight") {
      if (!item.base) return [NaN, 0];
      const weight = credit / item.base;
      return [weight, (weight - 1) / data.weight_scale];
    }
    if (view === "difference") {
      const difference = credit - item.credit[0][place];
      return [difference, difference / data.difference_scale];
    }
    const value = item.fields[view][place];
    return [value, value / data.fields[view].scale];
  };
  const perMethod = () => !(view in data.fields);
  // A square root, so that small values show beside the largest.
  const shade = (strength) => Math.sqrt(Math.min(1, Math.abs(strength))).toFixed(3);
  const number = (value) => Number.isFinite(value) ? Number(value.toPrecision(3)).toString() : "–";

  const draw = () => {
    const item = response(current), place = element("panels");
    place.replaceChildren();
    spans = [];
    element("prompt").textContent = data.prompts[item.prompt];
    element("facts").textContent = [
      "response " + (current + 1) + " of " + responses.length, "prompt " + (item.prompt + 1),
      item.reward === null ? "not scored" : "reward " + number(item.reward),
      "advantage of the response " + number(item.base), item.length + " tokens",
    ].join(" · ");
    const listed = perMethod() ? methods.map((_, index) => index).filter((index) => shown.has(index)) : [0];
    for (const method of listed) place.append(panel(item, method));
    element("note").textContent = data.notes[view] || "White: 0. Full colour: the largest value of the page; the shade grows with the square root.";
    map();
  };
  const panel = (item, method) => {
    const section = document.createElement("section");
    section.className = "panel";
    const title = document.createElement("h3");
    title.textContent = perMethod() ? methods[method].name : view;
    const tokens = document.createElement("div");
    tokens.className = "tokens";
    const own = [];
    item.texts.forEach((text, place) => {
      if (text.startsWith("·") && place) tokens.append(document.createElement("wbr"));
      const span = document.createElement("span");
      span.className = "t";
      span.textContent = text;
      span.dataset.m = method;
      span.dataset.p = place;
      if (item.hidden.has(place)) span.classList.add("x");
      else {
        const strength = valueOf(item, method, place)[1];
        span.classList.add(!perMethod() ? "g" : strength < 0 ? "d" : "u");
        span.style.setProperty("--a", shade(strength));
      }
      tokens.append(span);
      own.push(span);
    });
    spans.push(own);
    section.append(title, tokens);
    return section;
  };

  // The mini-map: the first panel from top to bottom, one stripe per token.
  const map = () => {
    const canvas = element("map"), item = response(current);
    const ratio = devicePixelRatio || 1;
    canvas.width = canvas.clientWidth * ratio;
    canvas.height = canvas.clientHeight * ratio;
    const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    const colours = { u: style.getPropertyValue("--up"), d: style.getPropertyValue("--down"), g: style.getPropertyValue("--signal") };
    const listed = perMethod() ? methods.map((_, index) => index).filter((index) => shown.has(index)) : [0];
    const width = canvas.width / Math.max(1, listed.length), height = canvas.height / Math.max(1, item.length);
    listed.forEach((method, column) => {
      for (let place = 0; place < item.length; place += 1) {
        if (item.hidden.has(place)) continue;
        const strength = valueOf(item, method, place)[1];
        const kind = !perMethod() ? "g" : strength < 0 ? "d" : "u";
        pen.fillStyle = "rgb(" + colours[kind] + " / " + shade(strength) + ")";
        pen.fillRect(column * width, place * height, width - ratio, Math.max(height, 1));
      }
    });
  };
  element("map").addEventListener("click", (event) => {
    const item = response(current), share = event.offsetY / event.currentTarget.clientHeight;
    const listed = spans[Math.min(spans.length - 1, Math.floor(event.offsetX / event.currentTarget.clientWidth * spans.length))];
    if (listed) listed[Math.min(item.length - 1, Math.floor(share * item.length))]?.scrollIntoView({ block: "center" });
  });

  const tip = element("tip");
  document.addEventListener("pointerover", (event) => {
    const span = event.target instanceof Element ? event.target.closest(".t") : null;
    if (!span || span.dataset.p === undefined) { tip.hidden = true; return; }
    const item = response(current), place = Number(span.dataset.p), method = Number(span.dataset.m);
    const lines = ["token " + place + "  " + span.textContent.replaceAll("\n", "")];
    if (item.hidden.has(place)) lines.push("not chosen by the policy");
    else {
      for (const [index, row] of methods.entries()) {
        const credit = item.credit[index][place], weight = item.base ? "  (×" + number(credit / item.base) + ")" : "";
        lines.push((index === method ? "▸ " : "  ") + row.name + "  " + number(credit) + weight);
      }
      for (const [name, values] of Object.entries(item.fields)) lines.push("  " + name + "  " + number(values[place]) + " nats");
    }
    tip.textContent = lines.join("\n");
    tip.hidden = false;
    const box = span.getClientRects()[0];
    const below = box.bottom + 8 + tip.offsetHeight < innerHeight;
    tip.style.top = (below ? box.bottom + 6 : box.top - tip.offsetHeight - 6) + "px";
    tip.style.left = Math.max(6, Math.min(box.left, innerWidth - tip.offsetWidth - 6)) + "px";
  });
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  const go = (index) => {
    current = Math.max(0, Math.min(responses.length - 1, index));
    element("response").value = current;
    draw();
  };
  responses.forEach((item, index) => {
    const reward = item.reward === null ? "not scored" : "reward " + number(item.reward);
    element("response").append(new Option("prompt " + (item.prompt + 1) + " · " + reward + " · " + item.length + " tokens", index));
  });
  const views = ["advantage", "weight", "difference", ...Object.keys(data.fields)];
  const names = { advantage: "advantage Â", weight: "weight Â / advantage of the response", difference: "difference to " + methods[0].name };
  for (const name of views) element("view").append(new Option(names[name] || name, name));
  element("response").addEventListener("change", (event) => go(Number(event.target.value)));
  element("view").addEventListener("change", (event) => { view = event.target.value; draw(); });
  methods.forEach((method, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = method.name;
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => {
      if (shown.has(index) && shown.size > 1) shown.delete(index); else shown.add(index);
      button.setAttribute("aria-pressed", shown.has(index));
      draw();
    });
    element("methods").append(button);
  });
  document.addEventListener("keydown", (event) => {
    if (event.target instanceof HTMLSelectElement || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "j") go(current + 1);
    if (event.key === "k") go(current - 1);
    if (event.key === "v") { view = views[(views.indexOf(view) + 1) % views.length]; element("view").value = view; draw(); }
  });
  addEventListener("resize", map);
  // Begin where there is something to see: a response that did better than its group.
  const best = responses.reduce((top, item, index) => (item.base > responses[top].base ? index : top), 0);
  if (responses.length) go(best);
})();
