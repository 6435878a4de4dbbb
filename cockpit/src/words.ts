// SPDX-License-Identifier: GPL-2.0-or-later
// Words for states, sizes and times. Text of others is made visible: see `shown`.
import type { Survives, Vm } from './decode';

const _ = cockpit.gettext;

// Characters that change how their neighbours read, or show nothing: controls, bidirectional marks, zero-width ones, tags.
// eslint-disable-next-line no-control-regex
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\u{e0000}-\u{e007f}]/gu;

/** Text from a guest, a definition or a QEMU: what can't be seen is written as its number. */
export function shown(text: string): string {
    return text.replace(UNSEEN, one => `\\u{${one.codePointAt(0)!.toString(16)}}`);
}

/** As Intl wants it: Cockpit says pt_BR. */
const language = (): string | undefined => cockpit.language?.replace("_", "-");

/** Between a number and its unit: no line ends there. */
const NBSP = "\u00a0";

export function size(bytes: number | undefined): string {
    if (bytes === undefined)
        return "—";
    const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let unit = 0;
    let value = bytes;
    while (value >= 1024 && unit < units.length - 1) {
        value /= 1024;
        unit += 1;
    }
    return `${value.toLocaleString(language(), { maximumFractionDigits: value < 10 ? 1 : 0 })}${NBSP}${units[unit]}`;
}

export function length(seconds: number | undefined): string {
    if (seconds === undefined)
        return "—";
    if (seconds < 1)
        return `${Math.round(seconds * 1000)}${NBSP}ms`;
    if (seconds < 60)
        return `${seconds.toLocaleString(language(), { maximumFractionDigits: 1 })}${NBSP}s`;
    const whole = Math.round(seconds);
    return [Math.floor(whole / 60), "min", whole % 60, "s"].join(NBSP);
}

const MOMENT = { dateStyle: "medium", timeStyle: "short" } as const;

export function moment(epoch: number | undefined): string {
    if (epoch === undefined)
        return "—";
    return new Date(epoch * 1000).toLocaleString(language(), MOMENT);
}

/** From one moment to another, with what they have in common once. */
export function period(begin: number | undefined, end: number | undefined): string {
    if (begin === undefined || end === undefined || end < begin)
        return `${moment(begin)} – ${moment(end)}`;
    return new Intl.DateTimeFormat(language(), MOMENT).formatRange(begin * 1000, end * 1000);
}

export function survival(survives: Survives): string {
    switch (survives) {
    case "kexec": return _("A new kernel");
    case "qemu-restart": return _("A new QEMU, not a new kernel");
    default: return "—";
    }
}

const STATES: Record<string, string> = {
    stopped: _("Stopped"),
    starting: _("Starting"),
    running: _("Running"),
    paused: _("Paused"),
    suspended: _("Suspended"),
    saving: _("Saving"),
    saved: _("Saved"),
    loading: _("Loading"),
    held: _("Held"),
    "shut-down": _("Shut down"),
    unreachable: _("Unreachable"),
    recovering: _("Being looked at"),
};

export function state(value: string): string {
    return STATES[value] ?? value;
}

export type Tone = "green" | "blue" | "grey" | "orange" | "red";

export function tone(value: string): Tone {
    switch (value) {
    case "running": return "green";
    case "starting": case "saving": case "loading": case "saved": return "blue";
    case "held": case "unreachable": return "red";
    case "paused": case "suspended": case "recovering": return "orange";
    default: return "grey";
    }
}

const JOBS: Record<string, string> = {
    upgrade: _("Upgrade of the kernel"),
    back: _("Way back to the previous kernel"),
    drill: _("Drill"),
    "save-all": _("Save of all guests"),
    "before-kexec": _("Save of all guests before a kexec"),
    kexec: _("Kexec"),
    "soft-reboot": _("Soft reboot"),
    "load-all": _("Load of all guests"),
    load: _("Load of a guest"),
    "refresh-all": _("New QEMUs for all guests"),
    rollback: _("Rollback"),
    recover: _("Recovery"),
    reload: _("Reading of the definitions"),
};

export function kind(value: string): string {
    return JOBS[value] ?? value;
}

const OUTCOMES: Record<string, string> = {
    done: _("Done"),
    refused: _("Refused"),
    "rolled-back": _("Rolled back"),
    held: _("Held"),
    checked: _("Checked only"),
    checking: _("Being checked"),
    stopping: _("Under way"),
    saving: _("Under way"),
    saved: _("Saved"),
    committing: _("Under way"),
    "rolling-back": _("Being rolled back"),
    booted: _("Under way"),
    loading: _("Under way"),
};

export function outcome(value: string): string {
    return OUTCOMES[value] ?? value;
}

/** One line for the table: what an admin has to know first. */
export function trouble(vm: Vm): string {
    switch (vm.definition) {
    case "invalid": return vm.problem || _("Its definition cannot be used");
    case "gone": return vm.problem || _("Its definition is gone");
    }
    if (vm.held)
        return vm.held.reason;
    if (vm.state === "unreachable")
        return vm.problem || _("Its QEMU does not answer");
    if (vm.problem)
        return vm.problem;
    if (vm.checkpoint?.error)
        return vm.checkpoint.error;
    if (vm.blocked.length && vm.state !== "saved")
        return cockpit.format(_("Cannot be saved now: $0"), vm.blocked.join("; "));
    if (vm.qemuOutdated)
        return cockpit.format(_("Runs QEMU $0; $1 is installed"), vm.qemuRunning, vm.qemuInstalled || _("another one"));
    return "";
}
