// SPDX-License-Identifier: GPL-2.0-or-later
// What comes over D-Bus, as types. The agent may be older or newer than this page: what is missing, or is not what it
// should be, becomes undefined or an empty value, and never an error.

export type Dict = Record<string, unknown>;

export function isDict(value: unknown): value is Dict {
    return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Cockpit's variants are {t, v}; this is the value, with those inside it unwrapped too. */
export function plain(value: unknown): unknown {
    if (Array.isArray(value))
        return value.map(plain);
    if (!isDict(value))
        return value;
    const keys = Object.keys(value);
    if (keys.length === 2 && typeof value.t === "string" && "v" in value)
        return plain(value.v);
    return Object.fromEntries(keys.map(key => [key, plain(value[key])]));
}

export function dict(value: unknown): Dict {
    const found = plain(value);
    return isDict(found) ? found : {};
}

export function text(value: unknown): string {
    return typeof value === "string" ? value : "";
}

export function number(value: unknown): number | undefined {
    return typeof value === "number" && Number.isFinite(value) ? value : undefined;
}

/** A time or a length of which 0 says that it is not known. */
export function known(value: unknown): number | undefined {
    return number(value) || undefined;
}

export function flag(value: unknown): boolean {
    return value === true;
}

export function list(value: unknown): unknown[] {
    return Array.isArray(value) ? value : [];
}

export function texts(value: unknown): string[] {
    return list(value).filter((one): one is string => typeof one === "string");
}

export interface Range {
    kind: string;
    device: string;
    size: number | undefined;
    offset: number | undefined;
}

export type Survives = "kexec" | "qemu-restart" | "";

export interface Held {
    reason: string;
    error: string;
    at: number | undefined;
    evidence: { what: string, expected: string, found: string }[];
}

export interface Checkpoint {
    id: string;
    vmstate: string;
    size: number | undefined;
    runState: string;
    survives: Survives;
    qemuVersion: string;
    machineType: string;
    kernel: string;
    witness: string;
    stoppedAt: number | undefined;
    error: string;
}

export interface Vm {
    path: string;
    name: string;
    description: string;
    state: string;
    runState: string;
    since: number | undefined;
    cpus: number | undefined;
    autostart: boolean;
    definition: string;
    pid: number;
    owner: string;
    unit: string;
    user: string;
    qemu: string;
    qemuRunning: string;
    qemuInstalled: string;
    qemuOutdated: boolean;
    memory: Range[];
    size: number | undefined;
    survives: Survives;
    lastPause: number | undefined;
    checkpoint: Checkpoint | undefined;
    blocked: string[];
    problem: string;
    held: Held | undefined;
}

function survives(value: unknown): Survives {
    return value === "kexec" || value === "qemu-restart" ? value : "";
}

function range(value: unknown): Range {
    const one = dict(value);
    return { kind: text(one.kind), device: text(one.device), size: number(one.size), offset: number(one.offset) };
}

export function vm(path: string, raw: Dict): Vm {
    const p = dict(raw);
    const memory = dict(p.Memory);
    const checkpoint = dict(p.Checkpoint);
    const held = dict(p.Held);
    return {
        path,
        name: text(p.Name),
        description: text(p.Description),
        state: text(p.State),
        runState: text(p.RunState),
        since: known(p.Since),
        cpus: known(p.Cpus),
        autostart: flag(p.Autostart),
        definition: text(p.DefinitionState) || "ok",
        pid: number(p.MainPID) ?? 0,
        owner: text(p.Owner),
        unit: text(p.Unit),
        user: text(p.User),
        qemu: text(p.Qemu),
        qemuRunning: text(p.QemuRunning),
        qemuInstalled: text(p.QemuInstalled),
        qemuOutdated: flag(p.QemuOutdated) && text(p.QemuRunning) !== "",
        memory: memory.nodes ? list(memory.nodes).map(range) : Object.keys(memory).length ? [range(memory)] : [],
        size: number(memory.size),
        survives: survives(memory.survives),
        lastPause: known(p.LastPause),
        checkpoint: Object.keys(checkpoint).length
            ? {
                id: text(checkpoint.id),
                vmstate: text(checkpoint.vmstate),
                size: number(checkpoint.size),
                runState: text(checkpoint["run-state"]),
                survives: survives(checkpoint.survives),
                qemuVersion: text(checkpoint["qemu-version"]),
                machineType: text(checkpoint["machine-type"]),
                kernel: text(checkpoint.kernel),
                witness: text(checkpoint.witness),
                stoppedAt: known(checkpoint["stopped-at"]),
                error: text(checkpoint.error),
            }
            : undefined,
        blocked: texts(p.BlockedReasons),
        problem: text(p.Problem),
        held: Object.keys(held).length
            ? {
                reason: text(held.reason),
                error: text(held.error),
                at: known(held.at),
                evidence: list(held.evidence).map(one => {
                    const [what, expected, found] = list(one);
                    return { what: text(what), expected: text(expected), found: text(found) };
                }),
            }
            : undefined,
    };
}

export interface GuestStep {
    vm: string;
    step: string;
    since: number | undefined;
    error: string;
}

export interface Job {
    path: string;
    id: number;
    kind: string;
    state: string;
    progress: number;
    step: string;
    result: string;
    cancellable: boolean;
    startedAt: number | undefined;
    endedAt: number | undefined;
    guests: GuestStep[];
    error: string;
    remedy: string;
}

export function job(path: string, raw: Dict): Job {
    const p = dict(raw);
    const error = dict(p.Error);
    return {
        path,
        id: number(p.Id) ?? 0,
        kind: text(p.Kind),
        state: text(p.State),
        progress: number(p.Progress) ?? 0,
        step: text(p.Step),
        result: text(p.Result),
        cancellable: "Cancellable" in p ? flag(p.Cancellable) : true,
        startedAt: known(p.StartedAt),
        endedAt: known(p.EndedAt),
        guests: Object.entries(dict(p.Guests)).map(([vm, value]) => {
            const one = dict(value);
            return { vm, step: text(one.step), since: known(one.since), error: text(one.error) };
        }).sort((a, b) => a.vm.localeCompare(b.vm)),
        error: text(error.text) || text(error.what),
        remedy: text(error.remedy),
    };
}

export interface Upgrade {
    id: string;
    kind: string;
    phase: string;
    kernelFrom: string;
    kernelTo: string;
    reason: string;
    startedAt: number | undefined;
    longestPause: number | undefined;
    failures: string[];
}

export interface Manager {
    version: string;
    hostname: string;
    kernel: string;
    kernels: string[];
    lastUpgrade: Upgrade | undefined;
    /** The agent's interface is that of this page's version. */
    current: boolean;
}

export function manager(raw: Dict): Manager {
    const p = dict(raw);
    const upgrade = dict(p.LastUpgrade);
    return {
        version: text(p.Version),
        hostname: text(p.Hostname),
        kernel: text(p.Kernel),
        kernels: texts(p.Kernels),
        lastUpgrade: text(upgrade.id)
            ? {
                id: text(upgrade.id),
                kind: text(upgrade.kind),
                phase: text(upgrade.phase),
                kernelFrom: text(upgrade["kernel-from"]),
                kernelTo: text(upgrade["kernel-to"]),
                reason: text(upgrade.reason),
                startedAt: known(upgrade["started-at"]),
                longestPause: known(upgrade["longest-pause"]),
                failures: texts(upgrade.failures),
            }
            : undefined,
        current: "LastUpgrade" in p,
    };
}

export type Severity = "error" | "warning" | "info";

export interface Finding {
    severity: Severity;
    code: string;
    what: string;
    why: string;
    remedy: string;
    vm: string;
    seconds: number | undefined;
}

export function findings(value: unknown): Finding[] {
    return list(value).map(one => {
        const f = dict(one);
        const severity = text(f.severity);
        return {
            severity: severity === "warning" || severity === "info" ? severity : "error",
            code: text(f.code),
            what: text(f.what),
            why: text(f.why),
            remedy: text(f.remedy),
            vm: text(f.vm),
            seconds: number(f.seconds),
        };
    });
}

export interface Device {
    node: string;
    uuid: string;
    size: number;
    align: number;
    numaNode: number | undefined;
    provider: string;
    mode: string;
    used: { offset: number, size: number, vm: string }[];
    free: { offset: number, size: number }[];
}

export function devices(value: unknown): Device[] {
    return list(value).map(one => {
        const d = dict(one);
        return {
            node: text(d.node),
            uuid: text(d.uuid),
            size: number(d.size) ?? 0,
            align: number(d.align) ?? 0,
            numaNode: number(d["numa-node"]),
            provider: text(d.provider),
            mode: text(d.mode),
            used: list(d.used).map(range => {
                const [offset, size, vm] = list(range);
                return { offset: number(offset) ?? 0, size: number(size) ?? 0, vm: text(vm) };
            }),
            free: list(d.free).map(range => {
                const [offset, size] = list(range);
                return { offset: number(offset) ?? 0, size: number(size) ?? 0 };
            }),
        };
    });
}

export interface HistoryEntry {
    id: string;
    upgrade: string;
    kernelBefore: string;
    kernelAfter: string;
    stoppedAt: number | undefined;
    pause: number | undefined;
}

export function history(value: unknown): HistoryEntry[] {
    return list(value).map(one => {
        const h = dict(one);
        return {
            id: text(h.id),
            upgrade: text(h.upgrade),
            kernelBefore: text(h["kernel-before"]),
            kernelAfter: text(h["kernel-after"]),
            stoppedAt: known(h["stopped-at"]),
            pause: number(h.pause),
        };
    });
}

export interface ReportEntry {
    id: string;
    kind: string;
    outcome: string;
    reason: string;
    startedAt: number | undefined;
    endedAt: number | undefined;
    kernelBefore: string;
    kernelAfter: string;
    vms: string[];
    longestPause: number | undefined;
}

export function reports(value: unknown): ReportEntry[] {
    return list(value).map(one => {
        const r = dict(one);
        return {
            id: text(r.id),
            kind: text(r.kind),
            outcome: text(r.outcome),
            reason: text(r.reason),
            startedAt: known(r["started-at"]),
            endedAt: known(r["ended-at"]),
            kernelBefore: text(r["kernel-before"]),
            kernelAfter: text(r["kernel-after"]),
            vms: texts(r.vms),
            longestPause: number(r["longest-pause"]),
        };
    });
}

export interface Span {
    name: string;
    begin: number;
    end: number;
}

export interface ReportGuest {
    vm: string;
    outcome: string;
    pause: number | undefined;
    why: string;
    evidence: { what: string, expected: string, found: string }[];
    spans: Span[];
}

export interface Report {
    id: string;
    kind: string;
    outcome: string;
    host: string;
    headline: string;
    verdict: string;
    tone: string;
    reason: string;
    startedAt: number | undefined;
    endedAt: number | undefined;
    kernelBefore: string;
    kernelAfter: string;
    failures: string[];
    phases: Span[];
    guests: ReportGuest[];
}

function spans(value: unknown): Span[] {
    return list(value).map(one => {
        const s = dict(one);
        return { name: text(s.name), begin: number(s.begin) ?? 0, end: number(s.end) ?? 0 };
    }).filter(span => span.begin > 0 && span.end >= span.begin);
}

export function report(json: string): Report {
    const r = dict(JSON.parse(json));
    const verdict = dict(r.verdict);
    return {
        id: text(r.id),
        kind: text(r.kind),
        outcome: text(r.outcome),
        host: text(r.host),
        headline: text(r.headline),
        verdict: text(verdict.text),
        tone: text(verdict.tone),
        reason: text(r.reason),
        startedAt: known(r.started_at),
        endedAt: known(r.ended_at),
        kernelBefore: text(r.kernel_before),
        kernelAfter: text(r.kernel_after),
        failures: texts(r.failures),
        phases: spans(r.phases),
        guests: list(r.guests).map(one => {
            const g = dict(one);
            return {
                vm: text(g.vm),
                outcome: text(g.outcome),
                pause: number(g.pause_s),
                why: text(g.why),
                evidence: list(g.evidence).map(row => {
                    const [what, expected, found] = list(row);
                    return { what: text(what), expected: text(expected), found: text(found) };
                }),
                spans: spans(g.spans),
            };
        }),
    };
}
