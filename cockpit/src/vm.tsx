// SPDX-License-Identifier: GPL-2.0-or-later
import {
    Breadcrumb, BreadcrumbItem, Button, Card, CardBody, CardHeader, CardTitle, DescriptionList,
    DescriptionListDescription, DescriptionListGroup, DescriptionListTerm, EmptyState, EmptyStateBody, Label,
} from '@patternfly/react-core';
import { Table, Tbody, Td, Th, Thead, Tr } from '@patternfly/react-table';
import { type ReactNode, useEffect, useState } from 'react';

import * as decode from './decode';
import { useAnswer, usePage } from './hooks';
import { Confirm, Evidence, Failure, Findings, Foreign, href, Notice, Prose, StateLabel } from './parts';
import { length, moment, shown, size, survival, trouble } from './words';

const _ = cockpit.gettext;
const HISTORY = 20;

interface Act {
    name: string;
    label: string;
    method: string;
    type?: string;
    args?: unknown[];
    /** What is asked before; without it the act begins at once. */
    question?: string;
    danger?: boolean;
    /** The name has to be typed. */
    typed?: boolean;
}

const START: Act = { name: "start", label: _("Start"), method: "Start" };
const SHUT_DOWN: Act = {
    name: "stop",
    label: _("Shut down"),
    method: "Stop",
    type: "s",
    args: ["acpi"],
    question: _("Its power button is pressed. If it does not end in time, its QEMU is told to quit."),
};
const FORCE_OFF: Act = {
    name: "force-off",
    label: _("Force off"),
    method: "Stop",
    type: "s",
    args: ["hard"],
    question: _("The guest ends at once, as if its power were cut. Data that it has not written are lost."),
    danger: true,
};
const SAVE: Act = {
    name: "save",
    label: _("Save"),
    method: "CprSave",
    type: "ssa{sv}",
    args: ["", "reboot", {}],
    question: _("The guest stops, and stands still until it is loaded."),
};
const LOAD: Act = { name: "load", label: _("Load"), method: "CprLoad", type: "sa{sv}", args: ["", {}] };
const RESUME: Act = { name: "resume", label: _("Resume"), method: "Resume" };
const REFRESH: Act = {
    name: "refresh",
    label: _("New QEMU"),
    method: "Refresh",
    type: "a{sv}",
    args: [{}],
    question: _("The guest moves into a QEMU of the installed program, and pauses for a moment."),
};
const DISCARD: Act = {
    name: "discard",
    label: _("Discard"),
    method: "Discard",
    question: _("The checkpoint is given up, and the saved guest is lost for good."),
    danger: true,
    typed: true,
};

function acts(vm: decode.Vm): Act[] {
    switch (vm.state) {
    case "running": case "suspended": return [SAVE, REFRESH, SHUT_DOWN, FORCE_OFF];
    case "paused": return [RESUME, SAVE, REFRESH, FORCE_OFF];
    case "saved": return [LOAD, ...vm.pid ? [RESUME] : [], DISCARD];
    case "held": return [LOAD, DISCARD];
    case "stopped": case "shut-down": return vm.definition === "invalid" || vm.definition === "gone" ? [] : [START];
    case "unreachable": return [FORCE_OFF];
    default: return [];
    }
}

const Fact = ({ term, children }: { term: string, children: ReactNode }) => <DescriptionListGroup>
    <DescriptionListTerm>{term}</DescriptionListTerm>
    <DescriptionListDescription>{children}</DescriptionListDescription>
</DescriptionListGroup>;

const Facts = ({ title, children }: { title: string, children: ReactNode }) => <Card>
    <CardTitle component="h2">{title}</CardTitle>
    <CardBody><DescriptionList isHorizontal isCompact>{children}</DescriptionList></CardBody>
</Card>;

const History = ({ vm }: { vm: decode.Vm }) => {
    const { agent } = usePage();
    const { value, error } = useAnswer(
        async () => decode.history((await agent.manager("ListHistory", "a{sv}", {
            vm: cockpit.variant("s", vm.name), limit: cockpit.variant("u", HISTORY)
        }))[0]).reverse(),
        `${vm.name} ${vm.state}`);
    return <Card>
        <CardTitle component="h2">{_("History")}</CardTitle>
        <CardBody>
            {error && <Failure title={_("The history cannot be shown.")} text={error} />}
            {value && !value.length && _("It was never loaded.")}
            {value && value.length > 0 && <Table aria-label={_("History")} variant="compact">
                <Thead><Tr><Th>{_("Stopped")}</Th><Th>{_("Pause")}</Th><Th>{_("Kernel")}</Th><Th>{_("Report")}</Th></Tr></Thead>
                <Tbody>
                    {value.map(one => <Tr key={one.id}>
                        <Td dataLabel={_("Stopped")}>{moment(one.stoppedAt)}</Td>
                        <Td dataLabel={_("Pause")}>{length(one.pause)}</Td>
                        <Td dataLabel={_("Kernel")}>
                            {shown(one.kernelBefore === one.kernelAfter ? one.kernelAfter : `${one.kernelBefore} → ${one.kernelAfter}`)}
                        </Td>
                        <Td dataLabel={_("Report")}>
                            <a href={href("reports", one.upgrade || one.id)}
                               aria-label={cockpit.format(_("Report of $0"), moment(one.stoppedAt))}>{_("Report")}</a>
                        </Td>
                    </Tr>)}
                </Tbody>
            </Table>}
        </CardBody>
    </Card>;
};

const Checked = ({ vm }: { vm: decode.Vm }) => {
    const { agent } = usePage();
    const { value, error, again } = useAnswer(
        async () => decode.findings((await agent.call(vm.path, "VM", "Check", ""))[0]), `${vm.path} ${vm.state}`);
    return <Card>
        <CardHeader actions={{
            hasNoOffset: true, actions: <Button variant="secondary" size="sm" onClick={again}>{_("Check again")}</Button>
        }}>
            <CardTitle component="h2">{_("What would stop a save, or a load after a kexec")}</CardTitle>
        </CardHeader>
        <CardBody>
            {error && <Failure title={_("It could not be checked.")} text={error} />}
            {value && !error && <Findings findings={value} />}
        </CardBody>
    </Card>;
};

const Guest = ({ vm }: { vm: decode.Vm }) => {
    const { agent, state } = usePage();
    const [asked, setAsked] = useState<Act>();
    const [busy, setBusy] = useState("");
    const [error, setError] = useState<{ title: string, text: string }>();
    useEffect(() => { void agent.refresh(vm.path, "VM") }, [agent, vm.path, vm.state]);
    const begin = (act: Act) => {
        setBusy(act.name);
        setError(undefined);
        agent.call(vm.path, "VM", act.method, act.type ?? "", ...act.args ?? [])
                .catch((failed: Error) => setError({ title: cockpit.format(_("$0 failed"), act.label), text: failed.message }))
                .finally(() => setBusy(""));
    };
    const problem = trouble(vm);
    return <>
        <Card>
            <CardHeader actions={{
                hasNoOffset: true,
                actions: <div className="cpr-actions">
                    {acts(vm).map((act, index) => <Button key={act.name}
                        variant={act.danger ? "danger" : index || vm.held ? "secondary" : "primary"}
                        isDisabled={busy !== "" || state.link !== "live"} isLoading={busy === act.name}
                        onClick={() => act.question ? setAsked(act) : begin(act)}>{act.label}</Button>)}
                </div>,
            }}>
                <CardTitle component="h1"><Foreign>{vm.name}</Foreign>{" "}<StateLabel value={vm.state} /></CardTitle>
            </CardHeader>
            <CardBody>
                <div className="cpr-stack">
                    {error && !(vm.held && error.text.includes(vm.held.reason)) && <Failure title={error.title} text={error.text} onClose={() => setError(undefined)} />}
                    {vm.description && <div><Foreign>{vm.description}</Foreign></div>}
                    {vm.definition === "changed" && <Notice variant="info" title={_("Its definition has changed")}>
                        {_("The change counts from its next start on.")}
                    </Notice>}
                    {problem && !vm.held && <Notice variant="warning" title={_("Problem")}><Prose>{problem}</Prose></Notice>}
                    <DescriptionList isHorizontal isCompact columnModifier={{ lg: "2Col" }}>
                        <Fact term={_("In this state since")}>{moment(vm.since)}</Fact>
                        <Fact term={_("Last pause")}>{length(vm.lastPause)}</Fact>
                        <Fact term={_("Processors")}>{vm.cpus ?? "—"}</Fact>
                        <Fact term={_("Starts with the host")}>{vm.autostart ? _("Yes") : _("No")}</Fact>
                        <Fact term={_("Belongs to")}>{vm.owner === "libvirt" ? "libvirt" : _("the agent")}</Fact>
                        <Fact term={_("Unit")}><span className="cpr-mono"><Foreign>{vm.unit || "—"}</Foreign></span></Fact>
                    </DescriptionList>
                </div>
            </CardBody>
        </Card>
        {vm.held && <Card>
            <CardTitle component="h2">{_("Why it is held")}</CardTitle>
            <CardBody>
                <div className="cpr-stack">
                    <Notice variant="danger" title={_("The guest is kept untouched until an administrator decides")}>
                        <Prose>{vm.held.reason}</Prose>
                    </Notice>
                    <Evidence rows={vm.held.evidence} />
                </div>
            </CardBody>
        </Card>}
        <div className="cpr-cards">
            <Facts title={_("Memory")}>
                <Fact term={_("Size")}>{size(vm.size)}</Fact>
                <Fact term={_("It survives")}>{survival(vm.survives)}</Fact>
                {vm.memory.map((range, index) => <Fact key={index} term={_("Where")}>
                    <span className="cpr-mono"><Foreign>{range.device}</Foreign></span>
                    {range.offset ? ` + ${size(range.offset)}` : ""}
                </Fact>)}
            </Facts>
            <Facts title={_("QEMU")}>
                <Fact term={_("Program")}><span className="cpr-mono"><Foreign>{vm.qemu || "—"}</Foreign></span></Fact>
                <Fact term={_("Version that runs")}>
                    {shown(vm.qemuRunning) || "—"}
                    {vm.qemuOutdated && <>{" "}<Label isCompact color="orange">{_("Outdated")}</Label></>}
                </Fact>
                <Fact term={_("Version installed")}>{shown(vm.qemuInstalled) || "—"}</Fact>
                <Fact term={_("User")}>{shown(vm.user) || "—"}</Fact>
                <Fact term={_("Process")}>{vm.pid || "—"}</Fact>
                <Fact term={_("Run state")}>{shown(vm.runState) || "—"}</Fact>
            </Facts>
            {vm.checkpoint && <Facts title={_("Checkpoint")}>
                {vm.checkpoint.error
                    ? <Fact term={_("Problem")}><Foreign>{vm.checkpoint.error}</Foreign></Fact>
                    : <>
                        <Fact term={_("Stopped")}>{moment(vm.checkpoint.stoppedAt)}</Fact>
                        <Fact term={_("It survives")}>{survival(vm.checkpoint.survives)}</Fact>
                        <Fact term={_("Size")}>{size(vm.checkpoint.size)}</Fact>
                        <Fact term={_("QEMU")}>{shown(vm.checkpoint.qemuVersion)}</Fact>
                        <Fact term={_("Machine")}>{shown(vm.checkpoint.machineType)}</Fact>
                        <Fact term={_("Proof of its memory")}><span className="cpr-mono">{shown(vm.checkpoint.witness)}</span></Fact>
                    </>}
            </Facts>}
        </div>
        <Checked vm={vm} />
        <History vm={vm} />
        {asked && <Confirm title={`${asked.label}: ${shown(vm.name)}?`} act={asked.label} {...asked.danger ? { danger: true } : {}}
                           {...asked.typed ? { name: vm.name } : {}} onAct={() => begin(asked)} onClose={() => setAsked(undefined)}>
            {asked.question}
        </Confirm>}
    </>;
};

export const VmView = ({ name }: { name: string }) => {
    const { state } = usePage();
    const vm = state.vms.find(one => one.name === name);
    return <>
        <Breadcrumb>
            <BreadcrumbItem to={href()}>{_("Guests")}</BreadcrumbItem>
            <BreadcrumbItem isActive><Foreign>{name}</Foreign></BreadcrumbItem>
        </Breadcrumb>
        {vm
            ? <Guest vm={vm} />
            : <EmptyState headingLevel="h1" titleText={cockpit.format(_("There is no guest $0"), shown(name))}>
                <EmptyStateBody>{_("It may have been taken away, or the agent has not looked at it yet.")}</EmptyStateBody>
            </EmptyState>}
    </>;
};
