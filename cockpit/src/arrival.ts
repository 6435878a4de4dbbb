// SPDX-License-Identifier: GPL-2.0-or-later
// A kexec ends the session. Which upgrade this browser saw leave is kept, so that the page can open with its report.
const KEY = "cpr-agent:expected-report";
const OVER = ["done", "held", "rolled-back"];

export function expect(upgrade: string): void {
    localStorage.setItem(KEY, upgrade);
}

/** Whether this upgrade is the one that is waited for, and is over. True once. */
export function arrived(upgrade: string, phase: string): boolean {
    const waited = localStorage.getItem(KEY);
    if (waited === null || (waited === upgrade && !OVER.includes(phase)))
        return false;
    localStorage.removeItem(KEY);
    return waited === upgrade;
}
