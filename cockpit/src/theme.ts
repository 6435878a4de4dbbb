// SPDX-License-Identifier: GPL-2.0-or-later
/** Dark or light, as Cockpit's shell says: by its switch in this session, or as the desktop has it. */
export function followTheme(): void {
    const desktop = window.matchMedia("(prefers-color-scheme: dark)");
    const apply = (style = localStorage.getItem("shell:style") || "auto") => {
        const dark = style === "dark" || (style === "auto" && desktop.matches);
        document.documentElement.classList.toggle("pf-v6-theme-dark", dark);
    };
    window.addEventListener("storage", event => { if (event.key === "shell:style") apply() });
    window.addEventListener("cockpit-style", event => apply((event as CustomEvent<{ style: string }>).detail.style));
    desktop.addEventListener("change", () => apply());
    apply();
}
