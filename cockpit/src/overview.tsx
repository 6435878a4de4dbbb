// SPDX-License-Identifier: GPL-2.0-or-later
import {
    Button, Card, CardBody, CardHeader, CardTitle, DescriptionList, DescriptionListDescription, DescriptionListGroup,
    DescriptionListTerm, EmptyState, EmptyStateBody, Label,
} from '@patternfly/react-core';
import { Table, Tbody, Td, Th, Thead, Tr } from '@patternfly/react-table';
import { useEffect, useState } from 'react';

import * as decode from './decode';
import { useAnswer, usePage } from './hooks';
import { Confirm, Failure, Foreign, href, Notice, Prose, StateLabel } from './parts';
import { UpgradeDialog } from './upgrade';
import { kind, length, moment, outcome, shown, size, survival, trouble } from './words';
import { ROOT } from './agent';

const _ = cockpit.gettext;

const Fact = ({ term, children }: { term: string, children: React.ReactNode }) => <DescriptionListGroup>
    <DescriptionListTerm>{term}</DescriptionListTerm>
    <DescriptionListDescription>{children}</DescriptionListDescription>
</DescriptionListGroup>;

const LastUpgrade = ({ upgrade }: { upgrade: decode.Upgrade | undefined }) => {
    if (!upgrade)
        return <>{_("None yet")}</>;
    return <>
        <a href={href("reports", upgrade.id)}>{`${kind(upgrade.kind)}, ${moment(upgrade.startedAt)}`}</a>
        {": "}{outcome(upgrade.phase)}
    </>;
};

type Asked = "save" | "load" | "refresh" | "upgrade" | undefined;

export const Host = () => {
    const { agent, state, host } = usePage();
    const [asked, setAsked] = useState<Asked>();
    const [error, setError] = useState("");
    const { manager, vms, jobs } = state;
    const outdated = vms.filter(vm => vm.qemuOutdated).length;
    const newest = manager.kernels[0] ?? "";
    const busy = state.link !== "live" || jobs.some(job => job.state === "running");
    const live = vms.filter(vm => ["running", "paused", "suspended"].includes(vm.state)).length;
    const saved = vms.filter(vm => vm.state === "saved").length;
    const act = (method: string) => {
        setError("");
        agent.manager(method, "a{sv}", {}).catch((failed: Error) => setError(failed.message));
    };
    // Neither installed kernels nor QEMU programs are announced.
    useEffect(() => {
        void agent.refresh(ROOT, "Manager");
        for (const vm of agent.snapshot().vms)
            void agent.refresh(vm.path, "VM");
    }, [agent]);
    return <Card>
        <CardHeader actions={{
            hasNoOffset: true,
            actions: <div className="cpr-actions">
                <Button onClick={() => setAsked("upgrade")} isDisabled={busy}>{_("Upgrade kernel…")}</Button>
                <Button variant="secondary" onClick={() => setAsked("save")} isDisabled={busy || !live}>{_("Save all")}</Button>
                <Button variant="secondary" onClick={() => setAsked("load")} isDisabled={busy || !saved}>{_("Load all")}</Button>
                <Button variant="secondary" onClick={() => setAsked("refresh")} isDisabled={busy || !live}>
                    {_("New QEMU for all")}
                </Button>
            </div>,
        }}>
            <CardTitle component="h1"><Foreign>{host || _("This host")}</Foreign></CardTitle>
        </CardHeader>
        <CardBody>
            {error && <Failure title={_("It was not begun.")} text={error} onClose={() => setError("")} />}
            <DescriptionList isHorizontal isCompact columnModifier={{ lg: "2Col" }}>
                <Fact term={_("Kernel that runs")}>{shown(manager.kernel)}</Fact>
                <Fact term={_("Newest kernel installed")}>
                    {newest ? shown(newest) : "—"}
                    {newest && newest !== manager.kernel && <>{" "}<Label isCompact color="blue">{_("New")}</Label></>}
                </Fact>
                <Fact term={_("Last upgrade")}><LastUpgrade upgrade={manager.lastUpgrade} /></Fact>
                <Fact term={_("Its longest pause")}>{length(manager.lastUpgrade?.longestPause || undefined)}</Fact>
                <Fact term={_("Guests with an outdated QEMU")}>{cockpit.format(_("$0 of $1"), outdated, vms.length)}</Fact>
                <Fact term={_("Agent")}>{shown(manager.version)}</Fact>
            </DescriptionList>
        </CardBody>
        {asked === "upgrade" && <UpgradeDialog onClose={() => setAsked(undefined)} />}
        {asked === "save" && <Confirm title={_("Save all guests?")} act={_("Save all")} danger
                                      onAct={() => act("SaveAll")} onClose={() => setAsked(undefined)}>
            {cockpit.format(cockpit.ngettext("$0 guest stops, and stands still until it is loaded.",
                                             "$0 guests stop, and stand still until they are loaded.", live), live)}
        </Confirm>}
        {asked === "load" && <Confirm title={_("Load all saved guests?")} act={_("Load all")}
                                      onAct={() => act("LoadAll")} onClose={() => setAsked(undefined)}>
            {cockpit.format(cockpit.ngettext("$0 guest goes on where it was saved.",
                                             "$0 guests go on where they were saved.", saved), saved)}
        </Confirm>}
        {asked === "refresh" && <Confirm title={_("Give each guest a new QEMU?")} act={_("New QEMU for all")}
                                         onAct={() => act("RefreshAll")} onClose={() => setAsked(undefined)}>
            {_("Each guest pauses for a moment, one after the other. The job stops at the first that fails.")}
        </Confirm>}
    </Card>;
};

const Guests = ({ vms }: { vms: decode.Vm[] }) => <Table aria-label={_("Guests")} variant="compact" gridBreakPoint="grid-lg">
    <Thead>
        <Tr>
            <Th modifier="wrap">{_("Name")}</Th><Th modifier="wrap">{_("State")}</Th><Th modifier="wrap">{_("Memory")}</Th>
            <Th modifier="wrap">{_("Its RAM survives")}</Th><Th modifier="wrap">{_("Last pause")}</Th>
            <Th modifier="wrap">{_("Problem")}</Th>
        </Tr>
    </Thead>
    <Tbody>
        {vms.map(vm => <Tr key={vm.path}>
            <Td dataLabel={_("Name")}>
                <a href={href("vm", vm.name)}><Foreign>{vm.name}</Foreign></a>
                {vm.owner === "libvirt" && <>{" "}<Label isCompact>libvirt</Label></>}
                {vm.description && <div className="cpr-subtle"><Foreign>{vm.description}</Foreign></div>}
            </Td>
            <Td dataLabel={_("State")}><StateLabel value={vm.state} /></Td>
            <Td dataLabel={_("Memory")}>{size(vm.size)}</Td>
            <Td dataLabel={_("Its RAM survives")}>{survival(vm.survives)}</Td>
            <Td dataLabel={_("Last pause")}>{length(vm.lastPause)}</Td>
            <Td dataLabel={_("Problem")}>{trouble(vm) ? <Prose>{trouble(vm)}</Prose> : "—"}</Td>
        </Tr>)}
    </Tbody>
</Table>;

export const Overview = () => {
    const { agent, state } = usePage();
    const found = useAnswer(async () => decode.devices((await agent.manager("ListDevices"))[0]), "");
    const { vms } = state;
    const memory = found.value?.some(device => device.mode === "devdax") ?? true;
    const volatile = vms.length > 0 && vms.every(vm => vm.survives !== "kexec");
    return <>
        <Host />
        {!memory && (volatile || !vms.length) &&
            <Notice variant="warning" title={_("Nothing on this host keeps memory over a kexec")}>
                {_("Guests can get a new QEMU, but not a new kernel. /usr/share/doc/cpr-agent/memory.md tells how to set such memory up.")}
            </Notice>}
        <Card>
            <CardTitle component="h2">{_("Guests")}</CardTitle>
            <CardBody>
                {vms.length
                    ? <Guests vms={vms} />
                    : <EmptyState headingLevel="h3" titleText={_("No guests yet")} variant="sm">
                        <EmptyStateBody>
                            {_("Define one with “cprctl edit NAME”, or adopt a libvirt domain with “cprctl adopt NAME”.")}
                        </EmptyStateBody>
                    </EmptyState>}
            </CardBody>
        </Card>
    </>;
};
