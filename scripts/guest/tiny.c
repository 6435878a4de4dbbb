/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The smallest guest that can prove that it survived: its boot id and its counter are in RAM alone.
 *
 * About ten times a second it prints
 *     cpr-guest boot=<16 hex digits> count=<n> bad=<words of its pattern that were wrong so far>
 * on COM1. A multiboot (v1) image for `qemu-system-x86_64 -kernel`, machines q35 and pc, 16 MiB of RAM or more. Time comes
 * from the PIT's interrupt, so that an idle guest sleeps in hlt and a load resumes the tick where the save left it.
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

enum {
    COM1 = 0x3f8,
    PIT_HZ = 100,
    PIT_INPUT_HZ = 1193182,
    TICKS_PER_LINE = 10,
    PATTERN_START = 4 << 20,
    PATTERN_WORDS = (8 << 20) / 4,
    CHUNK_WORDS = (64 << 10) / 4,
    PM1_STATUS = 0, /* ACPI specification, PM1 event and control registers, from the PM base */
    PM1_ENABLE = 2,
    PM1_CONTROL = 4,
    POWER_BUTTON = 1 << 8,
    SLEEP_S5 = 1 << 13, /* SLP_EN with SLP_TYP 0, which is S5 on QEMU's ICH9 and PIIX4 */
};

__attribute__((section(".multiboot"), used)) static const u32 multiboot[] = {0x1badb002, 0, -0x1badb002u};

static u64 boot_id;
static volatile u32 ticks;

static void out8(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static void out16(u16 port, u16 value) { __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port)); }
static void out32(u16 port, u32 value) { __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port)); }
static u8 in8(u16 port) { u8 value; __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port)); return value; }
static u16 in16(u16 port) { u16 value; __asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port)); return value; }
static u32 in32(u16 port) { u32 value; __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port)); return value; }
static u64 rdtsc(void) { u64 value; __asm__ volatile("rdtsc" : "=A"(value)); return value; }

/* 0 if the CPU has no such instruction (bit 30) or it ran dry. */
static u32 rdrand(void)
{
    u32 eax = 1, ebx, ecx, edx, value = 0;
    u8 valid = 0;
    __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "=c"(ecx), "=d"(edx));
    if (ecx & 1u << 30)
        __asm__ volatile("rdrand %0; setc %1" : "=r"(value), "=qm"(valid));
    return valid ? value : 0;
}

/* ---- printing ---- */

static void print_char(char c)
{
    while (!(in8(COM1 + 5) & 0x20)) /* line status: transmitter holding register empty */
        ;
    out8(COM1, c);
}

static void print(const char *text)
{
    while (*text)
        print_char(*text++);
}

static void print_hex(u64 value)
{
    for (int shift = 60; shift >= 0; shift -= 4)
        print_char("0123456789abcdef"[(value >> shift) & 15]);
}

static void print_decimal(u32 value)
{
    char digits[10];
    int count = 0;
    do {
        digits[count++] = '0' + value % 10;
        value /= 10;
    } while (value);
    while (count)
        print_char(digits[--count]);
}

/* ---- descriptor tables and the tick ---- */

struct __attribute__((packed)) table { u16 limit; u32 base; };

static const u64 gdt[] = {0, 0x00cf9a000000ffffull, 0x00cf92000000ffffull}; /* flat code 8, flat data 16 */
static u64 idt[0x21];

__attribute__((interrupt)) static void on_tick(void *frame)
{
    (void)frame;
    ticks++;
    out8(0x20, 0x20); /* end of interrupt */
}

static void start_ticking(void)
{
    struct table gdtr = {sizeof gdt - 1, (u32)gdt}, idtr = {sizeof idt - 1, (u32)idt};
    u32 handler = (u32)on_tick;
    u16 divisor = PIT_INPUT_HZ / PIT_HZ;
    idt[0x20] = (u64)(handler & 0xffff0000) << 32 | 0x00008e0000080000ull | (handler & 0xffff);
    /* The multiboot loader's own GDT may be gone: reload every segment from ours. */
    __asm__ volatile("lgdt %0; ljmp $8, $1f; 1: mov %1, %%ds; mov %1, %%es; mov %1, %%ss; mov %1, %%fs; mov %1, %%gs"
                     : : "m"(gdtr), "r"(16));
    __asm__ volatile("lidt %0" : : "m"(idtr));
    out8(0x20, 0x11); /* both 8259s: edge triggered, cascaded, vectors from 0x20 and 0x28, 8086 mode */
    out8(0xa0, 0x11);
    out8(0x21, 0x20);
    out8(0xa1, 0x28);
    out8(0x21, 4);
    out8(0xa1, 2);
    out8(0x21, 1);
    out8(0xa1, 1);
    out8(0x21, 0xfe); /* the timer alone */
    out8(0xa1, 0xff);
    out8(0x43, 0x34); /* PIT channel 0, rate generator */
    out8(0x40, divisor & 0xff);
    out8(0x40, divisor >> 8);
    __asm__ volatile("sti");
}

/* ---- the power button ---- */

static u32 pci_read(u32 device, u32 function, u32 offset)
{
    out32(0xcf8, 0x80000000u | device << 11 | function << 8 | offset);
    return in32(0xcfc);
}

/* The PM base that the firmware set up: ICH9's LPC bridge on q35, PIIX4's power management function on pc. */
static u16 find_pm_base(void)
{
    if (pci_read(31, 0, 0) == 0x29188086)
        return pci_read(31, 0, 0x40) & 0xff80;
    if (pci_read(1, 3, 0) == 0x71138086)
        return pci_read(1, 3, 0x40) & 0xffc0;
    return 0;
}

/* ---- the pattern ---- */

static u32 pattern(u32 index) { return (index * 2654435761u) ^ (u32)boot_id; }

static void fill_pattern(void)
{
    u32 *words = (u32 *)PATTERN_START;
    for (u32 i = 0; i < PATTERN_WORDS; i++)
        words[i] = pattern(i);
}

static u32 count_bad(u32 chunk)
{
    const volatile u32 *words = (u32 *)PATTERN_START;
    u32 first = chunk * CHUNK_WORDS % PATTERN_WORDS, bad = 0;
    for (u32 i = first; i < first + CHUNK_WORDS; i++)
        bad += words[i] != pattern(i);
    return bad;
}

static void print_line_start(void)
{
    print("cpr-guest boot=");
    print_hex(boot_id);
}

__attribute__((used)) static void run(void)
{
    u32 count = 0, bad = 0;
    u16 pm_base = find_pm_base();

    out8(COM1 + 3, 0x80); /* 115200 8N1, FIFO off: a byte is either out or still in the register */
    out8(COM1, 1);
    out8(COM1 + 1, 0);
    out8(COM1 + 3, 3);
    out8(COM1 + 2, 0);

    boot_id = rdtsc() ^ (u64)rdrand() << 32 ^ rdrand();
    out8(0x70, 0); /* the RTC's seconds tell boots apart whose TSC starts alike */
    boot_id = (boot_id ^ (u64)in8(0x71) << 56) * 0x9e3779b97f4a7c15ull;
    boot_id ^= boot_id >> 29;
    fill_pattern();
    if (pm_base)
        out16(pm_base + PM1_ENABLE, POWER_BUTTON); /* QEMU tells of the button only if it is enabled */
    start_ticking();

    for (u32 next = TICKS_PER_LINE;; next += TICKS_PER_LINE) {
        while ((int)(ticks - next) < 0)
            __asm__ volatile("hlt");
        bad += count_bad(count);
        print_line_start();
        print(" count=");
        print_decimal(++count);
        print(" bad=");
        print_decimal(bad);
        print("\n");
        if (pm_base && in16(pm_base + PM1_STATUS) & POWER_BUTTON) {
            print_line_start();
            print(" poweroff\n");
            out16(pm_base + PM1_CONTROL, SLEEP_S5);
        }
    }
}

__asm__(".globl _start\n_start: cli; mov $stack_top, %esp; call run\n.lcomm stack, 4096\n.set stack_top, stack + 4096");
