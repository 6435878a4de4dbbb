// SPDX-License-Identifier: GPL-2.0-or-later
import {
    Button, Form, FormGroup, FormHelperText, FormSelect, FormSelectOption, HelperText, HelperTextItem, Modal, ModalBody,
    ModalFooter, ModalHeader, Radio, Spinner, TextInput,
} from '@patternfly/react-core';
import { useEffect, useState } from 'react';

import { ROOT } from './agent';
import * as decode from './decode';
import { useAnswer, usePage } from './hooks';
import { Failure, Findings, Notice, predicted } from './parts';
import { shown } from './words';

const _ = cockpit.gettext;

const POLICIES = [
    { name: "all-or-nothing", label: _("All guests or none"), text: _("If one cannot be saved, nothing happens.") },
    {
        name: "skip-unsaveable",
        label: _("Shut down those that cannot be saved"),
        text: _("The others are saved; these end in order, and start anew."),
    },
    { name: "force", label: _("Force"), text: _("The host restarts even if guests are lost.") },
];

export const UpgradeDialog = ({ onClose }: { onClose: () => void }) => {
    const { agent, state, host } = usePage();
    const { kernel: running, kernels } = state.manager;
    const [kernel, setKernel] = useState("");
    const [policy, setPolicy] = useState("all-or-nothing");
    const [most, setMost] = useState("");
    const [typed, setTyped] = useState("");
    const [busy, setBusy] = useState(false);
    const [error, setError] = useState("");
    useEffect(() => { void agent.refresh(ROOT, "Manager") }, [agent]);

    const wanted = kernel || kernels[0] || running;
    const pause = Number(most);
    const wrong = most !== "" && !(pause > 0);
    const options = {
        ...wanted === running ? { drill: cockpit.variant("b", true) } : { kernel: cockpit.variant("s", wanted) },
        policy: cockpit.variant("s", policy),
        ...most && !wrong ? { "max-pause": cockpit.variant("d", pause) } : {},
    };
    const key = JSON.stringify(options);
    const [asked, setAsked] = useState(key);
    useEffect(() => {
        const timer = window.setTimeout(() => setAsked(key), 300);
        return () => window.clearTimeout(timer);
    }, [key]);
    const check = useAnswer(async () => ({
        key: asked, findings: decode.findings((await agent.manager("Check", "a{sv}", options))[0])
    }), asked);
    const findings = check.value?.key === key ? check.value.findings : undefined;
    const obstacle = findings?.some(one => one.severity === "error") ?? true;
    const ready = !obstacle && !wrong && !busy && host !== "" && typed === host;
    const title = wanted === running ? _("Drill: restart into the same kernel") : _("Upgrade the kernel");

    const begin = () => {
        if (!ready)
            return;
        setBusy(true);
        agent.manager("Upgrade", "a{sv}", options)
                .then(onClose)
                .catch((failed: Error) => { setError(failed.message); setBusy(false) });
    };
    return <Modal isOpen variant="medium" onClose={onClose} aria-labelledby="upgrade-title" aria-describedby="upgrade-body">
        <ModalHeader title={title} labelId="upgrade-title" />
        <ModalBody id="upgrade-body">
            <Form onSubmit={event => { event.preventDefault(); begin() }}>
                <FormGroup label={_("Kernel")} fieldId="upgrade-kernel">
                    <FormSelect id="upgrade-kernel" value={wanted} onChange={(_event, value) => setKernel(value)}>
                        {[...new Set([...kernels, running])].map(one => <FormSelectOption key={one} value={one}
                            label={one === running ? cockpit.format(_("$0 (runs now)"), shown(one)) : shown(one)} />)}
                    </FormSelect>
                </FormGroup>
                <FormGroup label={_("Guests that cannot be saved")} role="radiogroup" fieldId="upgrade-policy">
                    {POLICIES.map(one => <Radio key={one.name} id={`upgrade-${one.name}`} name="upgrade-policy" label={one.label}
                        description={one.text} isChecked={policy === one.name} onChange={() => setPolicy(one.name)} />)}
                </FormGroup>
                <FormGroup label={_("Most pause, in seconds (not limited if empty)")} fieldId="upgrade-pause">
                    <TextInput id="upgrade-pause" value={most} inputMode="decimal" autoComplete="off"
                               validated={wrong ? "error" : "default"} onChange={(_event, value) => setMost(value)} />
                    {wrong && <FormHelperText><HelperText>
                        <HelperTextItem variant="error">{_("A number above 0")}</HelperTextItem>
                    </HelperText></FormHelperText>}
                </FormGroup>
                <div className="cpr-stack" aria-live="polite">
                    {check.error && <Failure title={_("It could not be checked.")} text={check.error} />}
                    {!findings && !check.error && <div><Spinner size="md" aria-label={_("Checking")} />{" "}{_("Checking…")}</div>}
                    {findings && <>
                        <div>{_("Predicted pause:")}{" "}<strong>{predicted(findings)}</strong></div>
                        <Findings findings={findings} />
                        {findings.length > 0 && <div>
                            <Button variant="secondary" size="sm" onClick={check.again}>{_("Check again")}</Button>
                        </div>}
                    </>}
                </div>
                <FormGroup label={cockpit.format(_("Type $0 to confirm"), shown(host))} fieldId="upgrade-host">
                    <TextInput id="upgrade-host" value={typed} autoComplete="off" spellCheck={false}
                               onChange={(_event, value) => setTyped(value)} />
                </FormGroup>
                <Notice variant="info" isPlain title={_("This page will lose the host, and opens with the report after the next login.")} />
                {error && <Failure title={_("It was not begun.")} text={error} />}
            </Form>
        </ModalBody>
        <ModalFooter>
            <Button variant="danger" isDisabled={!ready} isLoading={busy} onClick={begin}>
                {cockpit.format(_("Restart $0 into $1"), shown(host), shown(wanted))}
            </Button>
            <Button variant="link" onClick={onClose}>{_("Cancel")}</Button>
        </ModalFooter>
    </Modal>;
};
