// SPDX-License-Identifier: GPL-2.0-or-later
import { Card, CardBody, CardTitle, EmptyState, EmptyStateBody, Label } from '@patternfly/react-core';
import { Table, Tbody, Td, Th, Thead, Tr } from '@patternfly/react-table';
import { useEffect } from 'react';

import * as decode from './decode';
import { useAnswer, usePage } from './hooks';
import { Failure, Foreign, href } from './parts';
import { shown, size } from './words';

const _ = cockpit.gettext;

interface Part {
    offset: number;
    size: number;
    vm: string;
}

function parts(device: decode.Device): Part[] {
    return [...device.used, ...device.free.map(range => ({ ...range, vm: "" }))].sort((a, b) => a.offset - b.offset);
}

const Bar = ({ device }: { device: decode.Device }) => {
    const free = device.free.reduce((sum, range) => sum + range.size, 0);
    const label = cockpit.format(_("$0 of $1 are free"), size(free), size(device.size));
    return <div className="cpr-bar" role="img" aria-label={label}>
        {parts(device).map(part => <div key={part.offset} className={part.vm ? "cpr-used" : "cpr-free"}
                                        style={{ inlineSize: `${100 * part.size / (device.size || 1)}%` }}>
            {shown(part.vm)}
        </div>)}
    </div>;
};

const Device = ({ device }: { device: decode.Device }) => <Card>
    <CardTitle component="h2">
        <Foreign>{device.node}</Foreign>{` · ${size(device.size)} `}
        {device.mode !== "devdax" && <Label isCompact color="grey">{_("The kernel's own memory")}</Label>}
    </CardTitle>
    <CardBody>
        <div className="cpr-stack">
            <div className="cpr-subtle cpr-mono"><Foreign>{device.uuid}</Foreign></div>
            {device.mode === "devdax" && <>
                <Bar device={device} />
                <Table aria-label={cockpit.format(_("Ranges of $0"), shown(device.node))} variant="compact">
                    <Thead><Tr><Th>{_("Guest")}</Th><Th>{_("Offset")}</Th><Th>{_("Size")}</Th></Tr></Thead>
                    <Tbody>
                        {parts(device).map(part => <Tr key={part.offset}>
                            <Td dataLabel={_("Guest")}>
                                {part.vm ? <a href={href("vm", part.vm)}><Foreign>{part.vm}</Foreign></a> : _("Free")}
                            </Td>
                            <Td dataLabel={_("Offset")}>{size(part.offset)}</Td>
                            <Td dataLabel={_("Size")}>{size(part.size)}</Td>
                        </Tr>)}
                    </Tbody>
                </Table>
            </>}
        </div>
    </CardBody>
</Card>;

export const MemoryView = () => {
    const { agent, state } = usePage();
    const places = state.vms.map(vm => `${vm.name} ${JSON.stringify(vm.memory)}`).join();
    const { value, error, again } = useAnswer(async () => decode.devices((await agent.manager("ListDevices"))[0]), places);
    useEffect(() => {
        window.addEventListener("focus", again);
        return () => window.removeEventListener("focus", again);
    }, [again]);
    const elsewhere = state.vms.filter(vm => vm.memory.some(range => range.device.startsWith("/") && !range.device.startsWith("/dev/dax")));
    return <>
        <h1 className="pf-v6-c-title pf-m-xl">{_("Persistent memory")}</h1>
        {error && <Failure title={_("The devices cannot be shown.")} text={error} />}
        {value && !value.length && <EmptyState headingLevel="h2" titleText={_("No persistent memory on this host")}>
            <EmptyStateBody>
                {_("A guest lives through a kexec only if its RAM is in a devdax device. /usr/share/doc/cpr-agent/memory.md tells how to make one.")}
            </EmptyStateBody>
        </EmptyState>}
        {value?.map(device => <Device key={device.uuid || device.node} device={device} />)}
        {elsewhere.length > 0 && <Card>
            <CardTitle component="h2">{_("RAM in files")}</CardTitle>
            <CardBody>
                <Table aria-label={_("RAM in files")} variant="compact">
                    <Thead><Tr><Th>{_("Guest")}</Th><Th>{_("File")}</Th><Th>{_("Size")}</Th></Tr></Thead>
                    <Tbody>
                        {elsewhere.flatMap(vm => vm.memory.map((range, index) => <Tr key={`${vm.path} ${index}`}>
                            <Td dataLabel={_("Guest")}><a href={href("vm", vm.name)}><Foreign>{vm.name}</Foreign></a></Td>
                            <Td dataLabel={_("File")}><span className="cpr-mono"><Foreign>{range.device}</Foreign></span></Td>
                            <Td dataLabel={_("Size")}>{size(range.size)}</Td>
                        </Tr>))}
                    </Tbody>
                </Table>
            </CardBody>
        </Card>}
    </>;
};
