// The NBD clients that people have, against live devices and images.

package test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	kiB = 1 << 10
	miB = 1 << 20
)

// makeOrigin makes a sparse file of size bytes below dir whose first half is
// stamped in pass 1.
func makeOrigin(t *testing.T, dir, device string, size int64) (path string) {
	t.Helper()
	path = filepath.Join(dir, device+".img")
	p := make([]byte, size/2/SectorSize*SectorSize)
	Stamp(p, device, 0, 1)
	write(t, path, p)
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

// serveOrigin starts a daemon with one device, vda, of size bytes.
func serveOrigin(t *testing.T, size int64, args ...string) (d *daemon, origin string) {
	t.Helper()
	origin = makeOrigin(t, scratch(t), "vda", size)
	return serve(t, append([]string{origin}, args...)...), origin
}

// qemuIO runs commands of qemu-io over an export, and fails the test if one
// fails or a pattern is not found.
func qemuIO(t *testing.T, uri string, readOnly bool, commands ...string) {
	t.Helper()
	args := []string{"-f", "raw"}
	if readOnly {
		args = append(args, "-r")
	}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	out := run(t, "qemu-io", append(args, uri)...)
	if strings.Contains(out, "failed") {
		t.Fatalf("qemu-io %v\n%s", args, out)
	}
}

func TestQemuIO(t *testing.T) {
	needRoot(t)
	need(t, "qemu-io")
	d, _ := serveOrigin(t, 16*miB)
	live, image := d.uri("vda"), d.uri("vda@before")

	qemuIO(t, live, false, "write -P 0xa1 1M 1M", "write -P 0xa2 2097664 1536", "flush")
	mkdir(t, d.snapshot("before"))
	qemuIO(t, live, false,
		"write -P 0xb1 1052672 8k", // part of a chunk
		"write -P 0xb2 1113600 2k", // unaligned, over two chunks
		"write -f -P 0xb3 2M 64k",  // forced to stable storage
		"write -z 1540k 100k",
		"discard 1800k 64k",
		"aio_write -P 0xb4 3M 512k", "aio_write -P 0xb5 4M 512k", "aio_flush")

	qemuIO(t, live, true,
		"read -P 0xa1 1M 4k", "read -P 0xb1 1052672 8k",
		"read -P 0xb2 1113600 2k", "read -P 0xa1 1115648 512",
		"read -P 0xb3 2M 64k", "read -P 0 1540k 100k",
		"read -P 0xb4 3M 512k", "read -P 0xb5 4M 512k")
	qemuIO(t, image, true,
		"read -P 0xa1 1M 1M", "read -P 0xa2 2097664 1536")
	qemuIO(t, d.snapshot("before", "vda.img"), true,
		"read -P 0xa1 1M 1M", "read -P 0xa2 2097664 1536")
}

func TestQemuImg(t *testing.T) {
	needRoot(t)
	need(t, "qemu-img", "qemu-io")
	d, origin := serveOrigin(t, 32*miB)
	before := filepath.Join(d.dir, "before.img")

	compare := func(a, b string) {
		t.Helper()
		run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", a, b)
	}
	// QEMU's locks are not for files that blksnap holds.
	run(t, "cp", "--sparse=always", origin, before)
	compare(before, d.uri("vda"))

	mkdir(t, d.snapshot("s1"))
	qemuIO(t, d.uri("vda"), false, "write -P 1 0 3M", "write -P 2 20M 1k", "write -z 5M 2M")
	compare(before, d.uri("vda@s1"))
	compare(before, d.snapshot("s1", "vda.img"))
	if r := end(t, exec.Command("qemu-img", "compare", before, "-f", "raw", "-F", "raw", d.uri("vda"))); r.status != 1 {
		t.Errorf("the live device compares to its old content with status %d, want 1: %s", r.status, r.stdout)
	}

	converted := filepath.Join(d.dir, "converted.qcow2")
	run(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", d.uri("vda@s1"), converted)
	run(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", before, converted)

	// Restore, as the README shows it.
	run(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", before, d.uri("vda"))
	compare(before, d.uri("vda"))
	compare(before, d.uri("vda@s1"))
}

func TestNbdinfo(t *testing.T) {
	needRoot(t)
	need(t, "nbdinfo")
	d, _ := serveOrigin(t, 16*miB+512)
	mkdir(t, d.snapshot("s1"))

	for _, tc := range []struct {
		export string
		want   map[string]any
	}{
		{"vda", map[string]any{"export-size": 16*miB + 512., "is_read_only": false, "can_multi_conn": true,
			"can_flush": true, "can_fua": true, "can_trim": true, "can_zero": true}},
		{"vda@s1", map[string]any{"export-size": 16*miB + 512., "is_read_only": true, "can_multi_conn": true}},
		{"", map[string]any{"export-size": 16*miB + 512., "is_read_only": false}},
	} {
		t.Run("export "+tc.export, func(t *testing.T) {
			export := exports(t, "nbdinfo", "--json", d.uri(tc.export))[0]
			for key, want := range tc.want {
				if got := export[key]; got != want {
					t.Errorf("%s\n got %v\nwant %v", key, got, want)
				}
			}
		})
	}

	var names []string
	for _, e := range exports(t, "nbdinfo", "--json", "--list", d.uri("")) {
		names = append(names, fmt.Sprint(e["export-name"]))
	}
	if got, want := strings.Join(names, " "), "vda vda@s1"; got != want {
		t.Errorf("exports listed\n got %s\nwant %s", got, want)
	}
	if r := end(t, exec.Command("nbdinfo", d.uri("vdz"))); r.status == 0 {
		t.Errorf("an unknown export was opened: %s", r.stdout)
	}
}

// exports returns the exports that nbdinfo prints as JSON.
func exports(t *testing.T, name string, args ...string) []map[string]any {
	t.Helper()
	var info struct{ Exports []map[string]any }
	out := run(t, name, args...)
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		t.Fatalf("%s printed %s: %v", name, out, err)
	}
	return info.Exports
}

func TestNbdcopy(t *testing.T) {
	needRoot(t)
	need(t, "nbdcopy")
	d, origin := serveOrigin(t, 64*miB)
	before, after, copied := filepath.Join(d.dir, "before"), filepath.Join(d.dir, "after"), filepath.Join(d.dir, "copied")
	run(t, "cp", "--sparse=always", origin, before)
	mkdir(t, d.snapshot("s1"))

	content := make([]byte, 64*miB)
	Stamp(content[8*miB:40*miB], "vda", 8*miB, 2)
	write(t, after, content)
	run(t, "nbdcopy", "--connections=4", "--requests=64", after, d.uri("vda"))
	run(t, "cmp", after, origin)

	for _, export := range []string{"vda", "vda@s1"} {
		run(t, "nbdcopy", "--connections=4", "--requests=64", d.uri(export), copied)
		run(t, "cmp", copied, map[string]string{"vda": after, "vda@s1": before}[export])
	}
}

// fio writes and verifies its own checksums over several connections while
// snapshots are taken and destroyed as fast as they can be.
func TestFioVerifiesWhileSnapshotsComeAndGo(t *testing.T) {
	needRoot(t)
	need(t, "fio")
	if out := run(t, "fio", "--enghelp"); !strings.Contains(out, "nbd") {
		lacking(t, "fio was built without its nbd engine")
	}
	d, _ := serveOrigin(t, 64*miB)

	said := &log{}
	fio := exec.Command("fio", "--name=verify", "--ioengine=nbd", "--uri="+d.uri("vda"), "--rw=randrw",
		"--bsrange=512-128k", "--size=16M", "--offset_increment=16M", "--numjobs=3", "--iodepth=16", "--loops=3",
		"--verify=crc32c", "--verify_fatal=1", "--randrepeat=1", "--group_reporting")
	fio.Dir = d.dir
	fio.Stdout, fio.Stderr = said, said
	fio.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := fio.Start(); err != nil {
		t.Fatal(err)
	}
	fioEnded := make(chan error, 1)
	go func() { fioEnded <- fio.Wait() }()
	overdue := time.AfterFunc(2*patience, func() { fio.Process.Kill() })
	defer overdue.Stop()

	const atOnce = 3
	for taken := 0; ; taken++ {
		select {
		case err := <-fioEnded:
			if err != nil {
				t.Errorf("fio: %v\n%s", err, said)
			}
			if taken < 10 {
				t.Errorf("only %d snapshots were taken while fio ran", taken)
			}
			t.Logf("%d snapshots came and went", taken)
			return
		default:
		}
		mkdir(t, d.snapshot(fmt.Sprint("s", taken)))
		if taken >= atOnce {
			rmdir(t, d.snapshot(fmt.Sprint("s", taken-atOnce)))
		}
	}
}
