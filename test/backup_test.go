// Backups by the script of the manual.

package test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// backup is a directory of backups that docs/backup.sh makes of a daemon's
// devices.
type backup struct {
	*daemon
	script, to string
}

func newBackup(t *testing.T, d *daemon) *backup {
	t.Helper()
	b := &backup{d, filepath.Join(d.dir, "backup.sh"), filepath.Join(d.dir, "backups")}
	script := read(t, "../docs/backup.sh")
	if lines := strings.Count(script, "\n") + 1; lines > 40 {
		t.Errorf("the script has %d lines, want at most 40", lines)
	}
	write(t, b.script, []byte(script)) // where its user can read it
	mkdir(t, b.to)
	b.own(b.to)
	return b
}

// own gives a file to the daemon's user.
func (b *backup) own(path string) {
	b.t.Helper()
	if b.user == nil {
		return
	}
	if err := os.Chown(path, int(b.user.Uid), int(b.user.Gid)); err != nil {
		b.t.Fatal(err)
	}
}

// try runs the script as the daemon's user.
func (b *backup) try(args ...string) result {
	b.t.Helper()
	return b.asUser(`TREE=$1 script=$2; shift 2; export TREE; exec sh "$script" "$@"`,
		append([]string{b.mount, b.script, b.to}, args...)...)
}

func (b *backup) run(args ...string) {
	b.t.Helper()
	if r := b.try(args...); r.status != 0 || r.stderr != "" {
		b.t.Fatalf("backup.sh %v: status %d\n%s%s", args, r.status, r.stdout, r.stderr)
	}
}

// newest is the name of a device's newest backup, without its suffix.
func (b *backup) newest(device string) string {
	b.t.Helper()
	name, err := os.Readlink(filepath.Join(b.to, device+".qcow2"))
	if err != nil {
		b.t.Fatal(err)
	}
	return strings.TrimSuffix(name, ".qcow2")
}

func TestBackupScript(t *testing.T) {
	needRoot(t)
	need(t, "qemu-img")
	for _, tc := range []struct {
		name string
		user *syscall.Credential
	}{
		{"root", nil},
		{"nobody", nobody},
	} {
		t.Run(tc.name, func(t *testing.T) {
			need(t, "fusermount3")
			testBackupScript(t, newBackup(t, newDaemon(t, tc.user)))
		})
	}
}

// testBackupScript makes four backups of two disks, begins a new generation of one,
// makes another, and restores all of them.
func testBackupScript(t *testing.T, b *backup) {
	t.Logf("repeat with -seed=%d", *seed)
	rng := rand.New(rand.NewPCG(uint64(*seed), 4))
	devices := []string{"vda", "vdb"}
	origins := []string{makeOrigin(t, b.dir, "vda", 24*miB+512), makeOrigin(t, b.dir, "vdb", 4*miB)}
	for _, o := range origins {
		b.own(o)
	}
	b.start(origins...)
	live := b.open("vda")

	held := map[string]string{} // backup -> a copy of what the device held
	for round := range 5 {
		if round > 0 {
			changeForIncrement(t, live, rng, uint64(round+1))
		}
		if round == 4 {
			b.blksnap("cbt", "reset", "vda")
		}
		b.run()
		for i, device := range devices {
			name := b.newest(device)
			if held[name] != "" {
				t.Fatalf("round %d made no backup of %s: the newest is %s", round, device, name)
			}
			held[name] = filepath.Join(b.dir, fmt.Sprint(device, ".", round))
			run(t, "cp", origins[i], held[name])
			checkBackup(t, b, name, round == 0 || round == 4 && device == "vda")
		}
	}
	if left := b.json("snapshot", "list"); len(left) != 1 {
		t.Errorf("snapshots after the backups\n got %v\nwant the newest", left)
	}

	raw := filepath.Join(b.dir, "restored")
	for name, want := range held {
		run(t, "cp", origins[0], raw) // not what it will be
		run(t, "truncate", "-r", want, raw)
		b.own(raw)
		b.run(name, raw)
		run(t, "cmp", want, raw)
	}
	changeForIncrement(t, live, rng, 10)
	want := held[b.newest("vda")]
	b.run("vda", b.uri("vda"))
	run(t, "cmp", want, origins[0])
}

// checkBackup checks that the newest backup of a device is full, or that it has a
// backing file and is smaller than a full one.
func checkBackup(t *testing.T, b *backup, name string, full bool) {
	t.Helper()
	file := filepath.Join(b.to, name+".qcow2")
	info := run(t, "qemu-img", "info", file)
	if got := !strings.Contains(info, "backing file:"); got != full {
		t.Errorf("%s is full: %v, want %v\n%s", name, got, full, info)
	}
	device, _, _ := strings.Cut(name, "@")
	sizes := b.asUser(`stat -c %s "$1" "$2"`, file, b.snapshot("latest", device+".qcow2"))
	var got, whole int64
	if _, err := fmt.Sscan(sizes.stdout, &got, &whole); err != nil {
		t.Fatalf("sizes of %s: %v: %s%s", name, err, sizes.stdout, sizes.stderr)
	}
	if full && got != whole || !full && got > whole*3/4 {
		t.Errorf("size of %s, which is full: %v\n got %d\nwant that of a full one, %d, or less than three quarters", name, full, got, whole)
	}
}

// A chain that is damaged is found when the next backup is made over it, and stays
// the newest.
func TestBackupScriptFindsDamage(t *testing.T) {
	needRoot(t)
	need(t, "qemu-img")
	b := newBackup(t, newDaemon(t, nil))
	b.start(makeOrigin(t, b.dir, "vda", 8*miB))
	b.run()
	good := b.newest("vda")
	f, err := os.OpenFile(filepath.Join(b.to, good+".qcow2"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("damaged"), 2*miB); err != nil {
		t.Fatal(err)
	}
	if r := b.try(); r.status == 0 {
		t.Error("the backup over a damaged one succeeded")
	}
	if got := b.newest("vda"); got != good {
		t.Errorf("newest backup\n got %s\nwant %s", got, good)
	}

	// Without the link a new chain begins.
	if err := os.Remove(filepath.Join(b.to, "vda.qcow2")); err != nil {
		t.Fatal(err)
	}
	b.run()
	checkBackup(t, b, b.newest("vda"), true)
	if left := b.json("snapshot", "list"); len(left) != 1 {
		t.Errorf("snapshots after a failed and a good backup\n got %v\nwant the newest", left)
	}
}

// A file in the tree is what QEMU's tools read, also where the device goes on, and
// what changed is found by any number that since/ has.
func TestQCOW2OfTheTree(t *testing.T) {
	needRoot(t)
	need(t, "qemu-img")
	d, _ := serveOrigin(t, 24*miB+512)
	mkdir(t, d.snapshot("one"))
	older := filepath.Join(d.dir, "older")
	run(t, "cp", d.snapshot("one", "vda.img"), older)
	number := fmt.Sprint(readNumber(t, d.snapshot("one", "vda.cbt", "number")))
	rmdir(t, d.snapshot("one")) // only its number is needed
	live := d.open("vda")
	changeForIncrement(t, live, rand.New(rand.NewPCG(uint64(*seed), 5)), 2)
	mkdir(t, d.snapshot("two"))
	writeUntilTheEnd(t, live)

	image, increment := d.snapshot("two", "vda.img"), d.snapshot("two", "vda@"+number+".qcow2")
	compare := []string{"compare", "-f", "qcow2", "-F", "raw"}
	run(t, "qemu-img", append(compare, d.snapshot("two", "vda.qcow2"), image)...)
	run(t, "qemu-img", "check", d.snapshot("two", "vda.qcow2"))

	copied := filepath.Join(d.dir, "copied")
	run(t, "cp", "--sparse=always", increment, copied)
	if r := end(t, exec.Command("qemu-img", append(compare, copied, image)...)); r.status != 2 || !strings.Contains(r.stderr, "vda@"+number+"-"+read(t, d.snapshot("two", "vda.cbt", "generation"))) {
		t.Errorf("comparing an increment without its backing file: status %d, want 2 and its name: %s", r.status, r.stderr)
	}
	run(t, "qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", older, copied)
	run(t, "qemu-img", "check", copied)
	run(t, "qemu-img", append(compare, copied, image)...)

	for _, num := range []string{"999999999", "0" + number, "all", "-1"} {
		if path := d.snapshot("two", "vda@"+num+".qcow2"); exists(path) {
			t.Errorf("%s exists", path)
		}
	}
	f, err := os.Open(increment)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := syscall.Rmdir(d.snapshot("two")); err != syscall.EBUSY {
		t.Errorf("rmdir while an increment is open: %v, want EBUSY", err)
	}
	d.blksnap("snapshot", "destroy", "--force", "two")
	if _, err := f.ReadAt(make([]byte, 512), 0); err == nil {
		t.Error("an increment of a destroyed snapshot can be read")
	}
}

// A disk that grew and shrank between its backups is in each of them as long as it was
// then, with zeroes where it grew.
func TestBackupScriptOverResize(t *testing.T) {
	needRoot(t)
	need(t, "qemu-img")
	t.Logf("repeat with -seed=%d", *seed)
	rng := rand.New(rand.NewPCG(uint64(*seed), 7))
	d, origin := serveOrigin(t, 24*miB+512)
	b := newBackup(t, d)
	held := map[string]string{} // backup -> a copy of what the device held
	for round, size := range []int64{24*miB + 512, 33*miB + 3*512, 10*miB + 4*kiB, 30 * miB} {
		if round > 0 {
			if err := os.Truncate(origin, size); err != nil {
				t.Fatal(err)
			}
			b.blksnap("device", "resize", "vda")
			live := b.open("vda")
			changeForIncrement(t, live, rng, uint64(round+1))
			live.Close()
		}
		b.run()
		name := b.newest("vda")
		held[name] = filepath.Join(b.dir, fmt.Sprint("held.", round))
		run(t, "cp", origin, held[name])
		checkBackup(t, b, name, round == 0)
	}
	raw := filepath.Join(b.dir, "restored")
	for name, want := range held {
		write(t, raw, nil)
		run(t, "truncate", "-r", want, raw)
		b.run(name, raw)
		run(t, "cmp", want, raw)
	}
}
