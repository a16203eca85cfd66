# SPDX-License-Identifier: Apache-2.0
"""Check how Kata handles the container's VFIO devices: virtual IOMMU, ports, mode, annotations, hooks.

Each check is one function that returns findings. Sources: kata-containers at the places named in each function.
"""

from __future__ import annotations

import json

from oci_hooks.annotations import GUEST_CDI_DEVICE, HYPERVISOR_PREFIX, asks_for_guest_cdi
from oci_hooks.findings import Finding
from oci_hooks.host.hypervisor import find_kernel_refusal
from oci_hooks.host.kata.hints import make_viommu_hint, write_fix
from oci_hooks.host.kata.problems import check_other, check_refused, check_uncertain
from oci_hooks.host.kata.sandbox import Sandbox

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_hooks.host.kata.config import KataConfig, Setting
    from oci_hooks.host.targets import Target
    from oci_hooks.oci import Spec

# Hypervisors that never provide a virtual IOMMU, whatever the configuration (fc.go, stratovirt.go: iommu=off;
# dragonball.rs refuses it; remote runs no virtual machine itself).
WITHOUT_VIOMMU = ("firecracker", "stratovirt", "dragonball", "remote", "acrn", "openvmm")
# Machines whose PCI always has an IOMMU in a guest: zPCI, and sPAPR's TCE tables.
WITH_OWN_IOMMU = ("s390x", "ppc64le")
NO_PORT = "no-port"
GUEST_KERNEL = "guest-kernel"


def check_kata(sandbox: Sandbox, spec: Spec, targets: tuple[Target, ...]) -> tuple[Finding, ...]:
    """Return the findings of all checks of this module."""
    channel = bool(targets) and all(target.group is not None and target.group.is_channel for target in targets)
    return (
        *check_config(sandbox),
        *check_viommu(sandbox, channel),
        *check_viommu_support(sandbox, channel),
        *check_port(sandbox),
        *check_annotations(sandbox),
        *check_confidential(sandbox, targets),
        *check_rootless(sandbox, targets),
        *check_group_size(sandbox, targets),
        *check_domain(sandbox, targets),
        *check_mode(sandbox),
        *check_hooks(sandbox, spec),
    )


def check_config(sandbox: Sandbox) -> tuple[Finding, ...]:
    """kata-config-missing, kata-config-refused, kata-config-uncertain, kata-config-other."""
    if sandbox.config is not None:
        return (*check_refused(sandbox, sandbox.config), *check_uncertain(sandbox.config), *check_other(sandbox))
    hint = 'set its path in /etc/oci-vfio-hooks/host.toml: [kata] config = "/path/configuration.toml"'
    problem = "none of Kata's default locations has a configuration.toml"
    return (Finding("warning", "kata-config-missing", "Kata", problem, hint),)


def check_viommu(sandbox: Sandbox, channel: bool) -> tuple[Finding, ...]:
    """viommu-off: the guest gets no IOMMU, which vfio-pci in the guest needs.

    Only information where the configuration leaves the device to the guest's own driver (see check_mode).
    channel: only AP or CCW devices, which need no IOMMU.
    """
    if channel or sandbox.machine in WITH_OWN_IOMMU:
        return ()
    vmm, config = sandbox.hypervisor, sandbox.config
    setting = config.hypervisor_setting("enable_iommu", False) if config else None
    hint = make_viommu_hint(config, setting, sandbox.is_other_config)
    if vmm is not None and vmm.viommu:
        if vmm.viommu == "on":
            return ()
        problem = f"{vmm.process} runs without a virtual IOMMU ({vmm.evidence})"
        if config and setting:
            reported = config.describe(setting)
            problem += f"; {reported}" if setting.value is not True else f", although {reported}"
    elif config and setting:
        # Kata puts its own intel_iommu=on before these, and the kernel uses the last one.
        kernel = config.hypervisor_setting("kernel_params", "")
        refusal = find_kernel_refusal(str(config.reading.values["kernel_params"]))
        # If the value is ignored because there is no virtual IOMMU, viommu-unsupported reports it.
        is_on = setting.value is True or (setting.written is True and config.hypervisor in WITHOUT_VIOMMU)
        if is_on and not refusal:
            return ()
        # Print only the deciding parameter: others may contain a proxy's password.
        problem = config.describe(kernel.replace(value=refusal, written=refusal) if is_on else setting)
        if is_on:
            hint = f"remove {refusal} from kernel_params"
        elif setting.written is True and not setting.annotation:
            problem = f"{setting.describe()}, which Kata's Go runtime ignores for {config.hypervisor}"
    else:
        return ()
    certain = sandbox.level == "error" or (vmm is not None and vmm.viommu == "off")
    # guest-kernel (set in Kata's own files for QEMU) leaves the device to the guest's driver on purpose. Without
    # vfio_mode, this hook was declared for a container that lists VFIO devices and expects them as VFIO devices.
    kind = vmm.kind if vmm is not None else config.hypervisor if config else ""
    wanted = sandbox.wanted or (sandbox.mode == "" and kind == "qemu")
    level = "error" if wanted and certain else "warning" if wanted else "info"
    if not wanted:
        problem += "; the device works with the guest's native driver only; VFIO in the container needs a virtual IOMMU"
    return (Finding(level, "viommu-off", "virtual IOMMU", problem, hint),)


def check_viommu_support(sandbox: Sandbox, channel: bool) -> tuple[Finding, ...]:
    """viommu-unsupported: this machine type, hypervisor or architecture has no virtual IOMMU in Kata."""
    config = sandbox.config
    if channel or config is None or (sandbox.hypervisor is not None and sandbox.hypervisor.viommu == "on"):
        return ()
    iommu = config.hypervisor_setting("enable_iommu", False)
    is_on = iommu.value is True or iommu.written is True
    if not is_on and (not sandbox.wanted or sandbox.machine in WITH_OWN_IOMMU):
        return ()
    reason, is_fatal = explain_no_viommu(sandbox, config)
    if not reason:
        return ()
    reported = f"; {iommu.describe()}" if is_on else ""
    needed = sandbox.wanted and sandbox.machine not in WITH_OWN_IOMMU
    level = sandbox.level if needed or (is_fatal and is_on) else "warning"
    hint = "use a Kata runtime class with QEMU and machine_type q35 on x86_64, or Kata's own vfio_mode = guest-kernel"
    return (Finding(level, "viommu-unsupported", "virtual IOMMU", reason + reported, hint),)


def explain_no_viommu(sandbox: Sandbox, config: KataConfig) -> tuple[str, bool]:
    """Return why a configuration cannot have a virtual IOMMU ("" if it can), and whether Kata then refuses to start.

    Go refuses to start QEMU (qemu_arch_base.go, appendIOMMU) and runtime-rs Dragonball; others continue without one.
    """
    name = config.hypervisor
    if name in WITHOUT_VIOMMU:
        return (
            f"Kata has no virtual IOMMU for {name} ([hypervisor.{name}] in {config.place.real})",
            name == "dragonball",
        )
    if name == "clh" and config.flavour == "rs":
        return f"runtime-rs has no virtual IOMMU for Cloud Hypervisor ({config.place.real})", False
    if name != "qemu":
        return "", False
    is_fatal = config.flavour == "go"
    if sandbox.machine != "x86_64":
        return f"Kata has no virtual IOMMU on {sandbox.machine}", is_fatal
    machine = config.hypervisor_setting("machine_type", "q35")
    # An empty machine_type is the default, which is q35 (katautils/config-settings.go).
    return (
        (f"only machine type q35 has a virtual IOMMU, but {config.describe(machine)}", is_fatal)
        if machine.value
        not in (
            "q35",
            "",
        )
        else ("", False)
    )


def check_port(sandbox: Sandbox) -> tuple[Finding, ...]:
    """no-port, port-conflict: the port of the virtual machine for the device.

    Older releases have none of these keys and need no port.
    """
    config = sandbox.config
    if config is None or sandbox.attached or config.hypervisor not in ("qemu", "clh"):
        return ()
    return check_rs_port(sandbox, config) if config.flavour == "rs" else check_go_port(sandbox, config)


def check_rs_port(sandbox: Sandbox, config: KataConfig) -> tuple[Finding, ...]:
    """no-port, port-conflict of runtime-rs: hot plug needs ports of one kind (device/topology.rs, get_pcie_port)."""
    root_port = config.hypervisor_setting("pcie_root_port")
    switch_port = config.hypervisor_setting("pcie_switch_port")
    cold = config.hypervisor_setting("cold_plug_vfio")
    kinds = is_positive(root_port.value) + is_positive(switch_port.value)
    if kinds > 1:
        problem = f"{root_port.describe()}, and {switch_port.describe()}: runtime-rs accepts only one of them"
        return (Finding(sandbox.level, "port-conflict", "PCIe port", problem, write_fix(config, switch_port, "0")),)
    plugged_otherwise = config.hypervisor == "clh" or cold.value not in (None, NO_PORT)
    if plugged_otherwise or root_port.value is None or kinds == 1:
        return ()
    hint = write_fix(config, root_port, "1")
    return (Finding(sandbox.level, "no-port", "PCIe port", config.describe(root_port), hint),)


def check_go_port(sandbox: Sandbox, config: KataConfig) -> tuple[Finding, ...]:
    """no-port, port-conflict of Go (drivers/vfio.go, Attach; katautils/config.go, checkPCIeConfig)."""
    hot = config.hypervisor_setting("hot_plug_vfio")
    cold = config.hypervisor_setting("cold_plug_vfio")
    if hot.value is None and cold.value is None:
        return ()
    # Not a set: TOML may have a list or a table there, which cannot be hashed.
    used = [value for value in (hot.value, cold.value) if value not in (None, NO_PORT)]
    if not used:
        problem = f"{config.describe(hot if hot.value else cold)}, and no other plug setting selects a port"
        hint = write_fix(config, hot, '"root-port"')
        return (Finding(sandbox.level, "no-port", "PCIe port", problem, hint),)
    if hot.value in used and cold.value in used:
        problem = f"{hot.describe()}, and {cold.describe()}: Kata accepts only one of them"
        return (Finding(sandbox.level, "port-conflict", "PCIe port", problem, write_fix(config, cold, '"no-port"')),)
    deciding = hot if hot.value in used else cold
    if config.hypervisor == "clh" and deciding.value != "root-port":
        problem = f"Cloud Hypervisor supports only root-port, but {config.describe(deciding)}"
        return (
            Finding(sandbox.level, "port-conflict", "PCIe port", problem, write_fix(config, deciding, '"root-port"')),
        )
    return check_port_count(sandbox, config, hot)


def check_port_count(sandbox: Sandbox, config: KataConfig, hot: Setting) -> tuple[Finding, ...]:
    """no-port: in a pod Kata does not know the device when it creates the ports, so it needs spare ports (qemu.go,
    createPCIeTopology). Reported only by hand: in a pod the hook runs after the device was plugged."""
    stock = config.hypervisor_setting("pcie_root_port", 0)
    in_need = (
        hot.value == "root-port" and sandbox.runtime.is_cri and sandbox.runtime.by_hand and config.hypervisor == "qemu"
    )
    if not in_need or is_positive(stock.value):
        return ()
    hint = f"use the number of the pod's devices; for one device: {write_fix(config, stock, '1')}"
    problem = f"{config.describe(stock)}, but each device of a pod needs a port that exists when the VM starts"
    return (Finding("warning", "no-port", "PCIe port", problem, hint),)


def is_positive(value: object) -> bool:
    """Return whether a setting is a number above zero; annotations give it as text."""
    return str(value).isdigit() and int(str(value)) > 0


def check_annotations(sandbox: Sandbox) -> tuple[Finding, ...]:
    """annotation-not-allowed: Go refuses the sandbox (oci/utils.go, addAnnotations), runtime-rs ignores the annotation.

    A Go shim that started the hook has accepted the annotations already, so only a check by hand reports an error.
    """
    config = sandbox.config
    if config is None or not config.refused:
        return ()
    level = sandbox.level if config.flavour == "go" and sandbox.runtime.by_hand else "warning"
    patterns = config.hypervisor_setting("enable_annotations", [])
    names = ", ".join(name[len(HYPERVISOR_PREFIX) :] for name in config.refused)
    does = "refuses the sandbox" if config.flavour == "go" else "ignores the annotation"
    problem = f"enable_annotations in {config.place.real} does not allow {names}, so Kata {does}"
    admitted = [str(pattern) for pattern in patterns.value] if isinstance(patterns.value, list) else []
    wanted = admitted + [name[len(HYPERVISOR_PREFIX) :] for name in config.refused]
    listed = ", ".join(json.dumps(word) for word in wanted)
    hint = f"{write_fix(config, patterns, f'[{listed}]')}; or remove the annotation"
    return (Finding(level, "annotation-not-allowed", config.refused[0], problem, hint),)


def check_confidential(sandbox: Sandbox, targets: tuple[Target, ...]) -> tuple[Finding, ...]:
    """needs-iommufd: a confidential guest accepts no legacy group (qemu.go: "ConfidentialGuest needs IOMMUFD")."""
    config = sandbox.config
    if config is None or sandbox.attached:
        return ()
    setting = config.hypervisor_setting("confidential_guest", False)
    legacy = [t for t in targets if not t.cdev and t.group is not None and not t.group.is_channel]
    if setting.value is not True or not legacy:
        return ()
    # Not every release refuses it, and one that does never reaches the hook.
    problem = (
        f"is a legacy VFIO group, but a confidential guest accepts only /dev/vfio/devices/*: {config.describe(setting)}"
    )
    hint = "list the device's iommufd node instead: ls /sys/bus/pci/devices/*/vfio-dev"
    return tuple(Finding("warning", "needs-iommufd", target.subject, problem, hint) for target in legacy)


def check_rootless(sandbox: Sandbox, targets: tuple[Target, ...]) -> tuple[Finding, ...]:
    """group-denied: a hypervisor without root privileges cannot open the node (how-to-run-rootless-vmm.md)."""
    config = sandbox.config
    setting = config.hypervisor_setting("rootless", False) if config else None
    if config is None or setting is None or setting.value is not True or sandbox.attached:
        return ()
    problem = f"the hypervisor runs as an unprivileged user and may not be able to open it: {config.describe(setting)}"
    hint = "set rootless = false, or make that user the owner of the node with a udev rule"
    return tuple(
        Finding("warning", "group-denied", target.subject, problem, hint) for target in targets if target.group
    )


def check_group_size(sandbox: Sandbox, targets: tuple[Target, ...]) -> tuple[Finding, ...]:
    """multi-device-group: Go's cold plug passes only the first device of a group (sandbox.go, AppendDevice), and
    runtime-rs the primary one (qemu/inner.rs, hotplug_device)."""
    config = sandbox.config
    if config is None:
        return ()
    cold = config.hypervisor_setting("cold_plug_vfio", NO_PORT)
    if config.flavour == "go" and cold.value == NO_PORT:
        return ()
    findings = []
    for target in targets:
        devices = [member.name for member in target.group.passable] if target.group and not target.cdev else []
        if len(devices) > 1:
            who = "runtime-rs" if config.flavour == "rs" else f"Kata ({cold.describe()})"
            problem = f"has {len(devices)} devices ({', '.join(devices)}), but {who} passes only one of them"
            hint = "use Kata's Go runtime with hot_plug_vfio, or a device that is alone in its group"
            findings.append(Finding("warning", "multi-device-group", target.subject, problem, hint))
    return tuple(findings)


def check_domain(sandbox: Sandbox, targets: tuple[Target, ...]) -> tuple[Finding, ...]:
    """pci-domain: the runtime reports every device to the agent under domain 0000 (kata_agent.go, appendVfioDevice)."""
    findings = []
    for target in targets:
        members = target.group.passable if target.group else ()
        names = [member.name for member in members if member.pci and not member.name.startswith("0000:")]
        if names:
            problem = f"{', '.join(names)} is not in PCI domain 0000, so Kata passes wrong addresses to the guest"
            hint = (
                "PCIDEVICE_* variables in the container are not translated; write the guest's address into "
                "the annotation"
            )
            findings.append(Finding("warning", "pci-domain", target.subject, problem, hint))
    return tuple(findings)


def check_mode(sandbox: Sandbox) -> tuple[Finding, ...]:
    """vfio-mode: in guest-kernel mode the guest's own driver gets the device, so the container has no VFIO device."""
    config = sandbox.config
    if config is None:
        return ()
    mode = config.runtime_setting("vfio_mode", GUEST_KERNEL)
    if mode.value != GUEST_KERNEL:
        return ()
    does = (
        "vfio-guest-bind binds the device to vfio-pci in the guest"
        if sandbox.wanted
        else "no annotation asks for VFIO in this container, so the guest's own driver gets the device"
    )
    hint = (
        ""
        if sandbox.wanted
        else 'to use VFIO in the container: vfio_mode = "vfio", or annotation io.katacontainers.x.vfio.devices: "auto"'
    )
    return (Finding("info", "vfio-mode", "vfio_mode", f"{config.describe(mode)}: {does}", hint),)


def check_hooks(sandbox: Sandbox, spec: Spec) -> tuple[Finding, ...]:
    """hooks-dropped: runtime-rs drops the guest hooks if config.json has hooks (container.rs, amend_spec; agent rpc.rs,
    append_guest_hooks), but not those of a CDI specification in the guest."""
    config = sandbox.config
    rs = sandbox.runtime.kind == "kata-rs" or (
        not sandbox.runtime.flavour and config is not None and config.flavour == "rs"
    )
    path = config.hypervisor_setting("guest_hook_path", "") if config else None
    if not (rs and spec.raw.get("hooks") and config and path and path.value) or asks_for_guest_cdi(spec.annotations):
        return ()
    problem = f"config.json has hooks, so runtime-rs drops the guest hooks of {config.describe(path)}"
    hint = (
        "remove the hooks from config.json and run vfio-host-check --bundle before the container starts, or have the "
        f'guest add-on in the guest image and add the annotation cdi.k8s.io/vfio: "{GUEST_CDI_DEVICE}"'
    )
    return (Finding("warning", "hooks-dropped", "guest hooks", problem, hint),)
