// SPDX-License-Identifier: GPL-2.0-or-later
import { AlertActionCloseButton, Button, Label, Progress } from '@patternfly/react-core';
import { useState } from 'react';

import type { GuestStep, Job } from './decode';
import { usePage } from './hooks';
import { Failure, Foreign, Notice, Prose } from './parts';
import { shown } from './words';

const _ = cockpit.gettext;

const STEPS: Record<string, string> = {
    waiting: _("waiting"),
    preparing: _("preparing"),
    saving: _("saving"),
    saved: _("saved"),
    "shutting-down": _("shutting down"),
    "shut-down": _("shut down"),
    resuming: _("resuming"),
    resumed: _("resumed"),
    loading: _("loading"),
    loaded: _("loaded"),
    starting: _("starting"),
    started: _("started"),
    refreshing: _("getting a new QEMU"),
    refreshed: _("has a new QEMU"),
    refused: _("refused"),
    failed: _("failed"),
};

const Step = ({ guest }: { guest: GuestStep }) => {
    const bad = guest.error !== "" || guest.step === "failed" || guest.step === "refused";
    const step = STEPS[guest.step] ?? shown(guest.step);
    return <li>
        <Label isCompact color={bad ? "red" : guest.step === "waiting" ? "grey" : "blue"}>
            <Foreign>{guest.vm}</Foreign>{`: ${step}`}
        </Label>
        {guest.error && <>{" "}<Prose>{guest.error}</Prose></>}
    </li>;
};

const Banner = ({ job, title }: { job: Job, title: string }) => {
    const { agent } = usePage();
    const [error, setError] = useState("");
    const [asked, setAsked] = useState(false);
    const runs = job.endedAt === undefined && (job.state === "running" || job.state === "");
    const cancel = () => {
        setAsked(true);
        agent.call(job.path, "Job", "Cancel", "").catch((failed: Error) => { setAsked(false); setError(failed.message) });
    };
    if (!runs) {
        const good = job.result === "done" || job.result === "nothing to do";
        return <Notice variant={good ? "success" : job.result === "cancelled" ? "info" : "danger"} isLiveRegion
                      title={`${title}: ${ending(job)}`}
                      actionClose={<AlertActionCloseButton onClose={() => agent.forget(job.path)} />}>
            {!good && job.result !== "cancelled" && <Prose>{job.error || job.result}</Prose>}
        </Notice>;
    }
    return <Notice variant="info" title={title} className="cpr-job">
        <Progress value={Math.round(job.progress * 100)} aria-label={title} title={shown(job.step)} size="sm" />
        <ul className="cpr-steps">{job.guests.map(guest => <Step key={guest.vm} guest={guest} />)}</ul>
        {error && <Failure title={_("The job goes on.")} text={error} onClose={() => setError("")} />}
        {job.cancellable &&
            <Button variant="secondary" onClick={cancel} isDisabled={asked} isLoading={asked}>{_("Cancel")}</Button>}
    </Notice>;
};

function ending(job: Job): string {
    switch (job.result) {
    case "done": return _("done");
    case "nothing to do": return _("nothing to do");
    case "cancelled": return _("cancelled, everything was taken back");
    default: return _("failed");
    }
}

export const JobBanners = ({ jobs, title }: { jobs: Job[], title: (job: Job) => string }) =>
    <>{jobs.map(job => <Banner key={job.path} job={job} title={title(job)} />)}</>;
