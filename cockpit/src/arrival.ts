// SPDX-License-Identifier: GPL-2.0-or-later
// A kexec ends the session. Which upgrade this browser saw leave is kept, so that the page can open with its report.
const KEY = "cpr-agent:expected-report";
const OVER = ["done", "held", "rolled-back"];
export const COMMITTED = "committing";

/** Called in each phase: the host may be gone before the last one is seen. */
export function expect(upgrade: string, phase: string): void {
    localStorage.setItem(KEY, `${upgrade} ${phase}`);
}

/** Whether this upgrade is the one that is waited for, and is over. True once; never if it was taken back while guests were
 * being saved, for then the session goes on. */
export function arrived(upgrade: string, phase: string): boolean {
    const [waited, left] = localStorage.getItem(KEY)?.split(" ") ?? [];
    if (waited === undefined || (waited === upgrade && !OVER.includes(phase)))
        return false;
    localStorage.removeItem(KEY);
    return waited === upgrade && (phase !== "rolled-back" || left === COMMITTED);
}
