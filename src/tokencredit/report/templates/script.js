"use strict";
// What a token is worth, beside it: on hover, on touch, and with the arrow keys. Text only, never markup.
(() => {
  const tip = document.getElementById("tip");
  const show = (token) => {
    const { h, a, q, w, l } = token.dataset;
    const lines = ["token     " + token.textContent.replaceAll("\n", "")];
    if (a === undefined) lines.push("not chosen by the policy");
    else lines.push("advantage " + a);
    if (w !== undefined) lines.push("weight    " + w);
    if (l !== undefined) lines.push("log-prob  " + l);
    if (h !== undefined) lines.push("entropy   " + h + " nats");
    if (q) lines.push("quadrant  " + q);
    if (token.dataset.e !== undefined) lines.push("attention " + token.dataset.e);
    if (token.dataset.r !== undefined) lines.push("residual  " + token.dataset.r);
    tip.textContent = lines.join("\n");
    tip.hidden = false;
    const box = token.getClientRects()[0];
    const below = box.bottom + 8 + tip.offsetHeight < innerHeight;
    tip.style.top = (below ? box.bottom + 6 : box.top - tip.offsetHeight - 6) + "px";
    tip.style.left = Math.max(6, Math.min(box.left, innerWidth - tip.offsetWidth - 6)) + "px";
  };
  const hide = () => { tip.hidden = true; };
  const tokenOf = (event) => event.target instanceof Element ? event.target.closest(".t") : null;
  document.addEventListener("pointerover", (event) => { const token = tokenOf(event); token ? show(token) : hide(); });
  document.addEventListener("focusin", (event) => { const token = tokenOf(event); token ? show(token) : hide(); });
  const colour = document.getElementById("colour");
  const paint = () => { document.body.dataset.colour = colour.value; };
  if (colour) { colour.addEventListener("change", paint); paint(); }
  document.addEventListener("scroll", hide, { passive: true });
  document.addEventListener("keydown", (event) => {
    const token = tokenOf(event);
    if (event.key === "Escape") hide();
    if (!token) return;
    const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    let next = step && token[step];
    while (next && !next.classList.contains("t")) next = next[step]; // a <wbr>
    if (!next) return;
    event.preventDefault();
    token.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
})();
