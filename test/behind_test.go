// Origins that somebody else changes while no daemon serves them.

package test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const behindSize = 512 * kiB

// behindCases are what may be done to origins meanwhile: a script that finds the origin
// in $1, in $2 what was made beside it, and in $3 another disk of the same size; why is
// what the next start says, and empty where it must not notice anything.
var behindCases = []struct{ name, script, why string }{
	{"nothing", ``, ""},
	{"read", `cat "$1" > /dev/null; dd if="$1" of=/dev/null iflag=direct 2> /dev/null || true`, ""},
	{"byte", `printf x | dd of="$1" bs=1 seek=70000 conv=notrunc 2> /dev/null`, "written or changed behind our back"},
	{"put-back", `touch -r "$1" "$2"; printf x | dd of="$1" bs=1 seek=70000 conv=notrunc 2> /dev/null; touch -r "$2" "$1"`, "written or changed behind our back"},
	{"same-byte", `head -c 1 "$1" | dd of="$1" bs=1 conv=notrunc 2> /dev/null`, "written or changed behind our back"},
	{"mapped", `python3 -c 'import mmap,sys; f=open(sys.argv[1],"r+b"); mmap.mmap(f.fileno(),0)[70000]=1' "$1"`, "written or changed behind our back"},
	{"hole", `fallocate -p -o 65536 -l 65536 "$1"`, "written or changed behind our back"},
	{"cut", `truncate -s -4096 "$1"`, "size was changed from 524288 to 520192 bytes"},
	{"cut-and-grown", `truncate -s -4096 "$1"; truncate -s +4096 "$1"`, "written or changed behind our back"},
	{"grown", `truncate -s +4096 "$1"`, "size was changed from 524288 to 528384 bytes"},
	{"replaced", `mv "$3" "$1"`, "replaced by another file"},
	{"swapped", `mv "$1" "$2"; mv "$3" "$1"; mv "$2" "$3"`, "replaced by another file"},
	{"copy-moved", `cp --reflink=auto -p "$1" "$2"; mv "$2" "$1"`, "replaced by another file"},
	{"copied-over", `cp "$3" "$1"`, "written or changed behind our back"},
	{"restored", `cp -p "$1" "$2"; printf x | dd of="$1" bs=1 conv=notrunc 2> /dev/null; cp -p "$2" "$1"`, "written or changed behind our back"},
	{"synchronized", `cp -p "$1" "$2"; rsync -a --times --ignore-times --inplace "$2" "$1"`, "written or changed behind our back"},
	{"made-again", `cp "$1" "$2"; rm "$1"; cp "$2" "$1"`, "behind our back|replaced by another file"}, // its inode may be used again
	{"hard-link", `printf x | dd of="$1.link" bs=1 seek=70000 conv=notrunc 2> /dev/null`, "written or changed behind our back"},
	{"soft-link", `ln -sf "$3" "$1"`, "replaced by another file"},
	// Nothing tells these from a write: the change time is all that they leave.
	{"mode", `chmod 640 "$1"`, "written or changed behind our back"},
	{"touched", `touch "$1"`, "written or changed behind our back"},
	{"linked", `ln "$1" "$2"`, "written or changed behind our back"},
}

// Whatever was done to an origin while the daemon was stopped or killed: its history and
// its images go on only where nobody has written, and else everybody is told.
func TestWritesBehindOurBack(t *testing.T) {
	needRoot(t)
	need(t, "rsync", "python3")
	for _, tc := range []struct {
		name string
		end  func(d *daemon)
	}{
		{"stopped", (*daemon).stop},
		{"killed", func(d *daemon) { d.kill(); awaitLeases(t, d) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := scratch(t)
			b := &behind{t: t, dir: dir}
			for _, c := range behindCases {
				b.names = append(b.names, c.name)
			}
			args := b.makeOrigins()
			d := serve(t, args...)
			b.d = d
			before := b.live()
			tc.end(d)
			for _, c := range behindCases {
				sh(t, c.script, b.origin(c.name), filepath.Join(dir, "beside-"+c.name), filepath.Join(dir, "other-"+c.name))
			}
			d.start(args...)
			b.look()
			for _, c := range behindCases {
				t.Run(c.name, func(t *testing.T) { b.check(t, c.name, c.why, before[c.name]) })
			}
			if got := d.blksnap("device", "show", "grown"); !strings.Contains(got, "cbt/reason      the origin's size was changed from") {
				t.Errorf("device show does not say why the generation is a new one:\n%s", got)
			}
		})
	}
}

// behind is a daemon with an origin for each thing that is done to one.
type behind struct {
	t     *testing.T
	d     *daemon
	dir   string
	names []string // of its devices

	// What the start after that says.
	events  []map[string]any
	reasons map[string]any // why the generations began, by device
}

func (b *behind) origin(name string) string { return filepath.Join(b.dir, name+".img") }

// makeOrigins makes those of behindCases, and returns the arguments that serve them.
func (b *behind) makeOrigins() (args []string) {
	for _, c := range behindCases {
		other := filepath.Join(b.dir, "other-"+c.name)
		if err := os.Rename(makeOrigin(b.t, b.dir, "other", behindSize), other); err != nil {
			b.t.Fatal(err)
		}
		switch origin := b.origin(c.name); c.name {
		case "soft-link":
			target := makeOrigin(b.t, b.dir, "target", behindSize)
			if err := os.Symlink(target, origin); err != nil {
				b.t.Fatal(err)
			}
		default:
			makeOrigin(b.t, b.dir, c.name, behindSize)
			if c.name == "hard-link" {
				if err := os.Link(origin, origin+".link"); err != nil {
					b.t.Fatal(err)
				}
			}
		}
		args = append(args, c.name+"="+b.origin(c.name))
	}
	return args
}

// wasBefore is what a device was before the daemon ended.
type wasBefore struct {
	generation, number string
	image              []byte
}

// live takes a snapshot, and writes to each device after it.
func (b *behind) live() map[string]wasBefore {
	mkdir(b.t, b.d.snapshot("s1"))
	was := make(map[string]wasBefore)
	p := make([]byte, 8*kiB)
	for _, name := range b.names {
		live := b.d.open(name)
		const off = behindSize - 64*kiB // no superblock is there
		Stamp(p, name, off, 2)
		if err := live.writeAt(p, off); err != nil {
			b.t.Fatal(err)
		}
		live.Close()
		image, err := os.ReadFile(b.d.snapshot("s1", name+".img"))
		if err != nil {
			b.t.Fatal(err)
		}
		was[name] = wasBefore{read(b.t, b.d.device(name, "cbt", "generation")), read(b.t, b.d.device(name, "cbt", "number")), image}
	}
	return was
}

// look asks the daemon what it has to say after the next start.
func (b *behind) look() {
	b.events, b.reasons = b.d.json("events"), make(map[string]any)
	for _, dev := range b.d.json("device", "list") {
		b.reasons[dev["name"].(string)] = dev["cbt"].(map[string]any)["reason"]
	}
}

// check checks what that says of a device.
func (b *behind) check(t *testing.T, name, why string, was wasBefore) {
	var told []string
	for _, e := range b.events {
		if e["device"] == name && (e["kind"] == "generation" || e["kind"] == "snapshot-failed") {
			told = append(told, fmt.Sprintf("%v %v: %v", e["kind"], e["snapshot"], e["text"]))
		}
	}
	generation := read(t, b.d.device(name, "cbt", "generation"))
	image, err := os.ReadFile(b.d.snapshot("s1", name+".img"))
	if why == "" {
		if generation != was.generation || err != nil || !bytes.Equal(image, was.image) || len(told) != 0 {
			t.Errorf("the generation is kept: %v; the image is read with error %v; events: %q\nwant the same generation and image, and no event",
				generation == was.generation, err, told)
		}
		if got, want := read(t, b.d.device(name, "cbt", "since", was.number)), "458752 65536 data"; got != want {
			t.Errorf("changed since the snapshot\n got %q\nwant %q", got, want)
		}
		return
	}
	if generation == was.generation {
		t.Error("the old generation goes on over what somebody else wrote")
	}
	if exists(b.d.device(name, "cbt", "since", was.number)) {
		t.Errorf("the new generation answers for snapshot %s of the old one", was.number)
	}
	if !errors.Is(err, syscall.EIO) {
		t.Errorf("the image is read with error %v, want EIO", err)
	}
	says := func(what, text string) {
		if !slices.ContainsFunc(strings.Split(why, "|"), func(w string) bool { return strings.Contains(text, w) }) {
			t.Errorf("%s\n got %s\nwant %s", what, text, why)
		}
	}
	says("state of the image", read(t, b.d.snapshot("s1", name+".state")))
	if len(told) != 2 {
		t.Errorf("events: got %q, want one of the snapshot, and one of the generation", told)
	}
	for _, text := range told {
		says("event", text)
	}
	says("device list", fmt.Sprint(b.reasons[name]))
	logged := ""
	for line := range strings.Lines(b.d.stderr.String()) {
		if strings.Contains(line, `msg="new generation" device=`+name+" ") {
			logged += line
		}
	}
	says("the log", logged)
}

// awaitLeases returns when the clock of the file system is beyond the leases of a
// killed daemon, within which nobody can tell whose writes are whose.
func awaitLeases(t *testing.T, d *daemon) {
	t.Helper()
	leases, err := filepath.Glob(filepath.Join(d.runDir, "devices", "*", "lease"))
	if err != nil || len(leases) == 0 {
		t.Fatal("no leases", err)
	}
	var until int64
	for _, path := range leases {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		until = max(until, int64(binary.NativeEndian.Uint64(b[512:])))
	}
	if left := time.Until(time.Unix(0, until)); left > 10*time.Second {
		t.Fatalf("a lease runs for %v", left)
	}
	clock := filepath.Join(scratch(t), "clock")
	eventually(t, "the last lease has run out", func() bool {
		write(t, clock, []byte("x"))
		var st unix.Stat_t
		if err := unix.Stat(clock, &st); err != nil {
			t.Fatal(err)
		}
		return st.Ctim.Nano() > until
	})
}

// blockCases are what may be done to block devices meanwhile: by a script that finds the
// device in $1 and a name for what it makes in $2, or to what is attached to a loop device.
var blockCases = []struct {
	name, script, why string
	attach            func(b *behind, name, file string, detach func())
}{
	{name: "nothing"},
	{name: "read", script: `dd if="$1" of=/dev/null bs=64k 2> /dev/null`},
	{name: "written", script: `printf x | dd of="$1" bs=1 seek=70000 conv=notrunc 2> /dev/null`, why: "the origin was written behind our back"},
	{name: "zeroed", script: `blkdiscard -o 65536 -l 65536 "$1"`, why: "the origin was written behind our back"},
	{name: "mounted", script: `mkdir "$2"; mount "$1" "$2"; umount "$2"; rmdir "$2"`, why: "the origin was written behind our back"},
	{name: "attached-anew", why: "another disk, or was attached anew", attach: func(b *behind, name, file string, detach func()) {
		detach() // mostly it gets its number back
		b.link(name, loop(b.t, file, false))
	}},
	{name: "another-loop", why: "another disk, or was attached anew", attach: func(b *behind, name, file string, detach func()) {
		b.link(name, loop(b.t, file, false))
		detach()
	}},
	{name: "another-file", why: "another disk, or was attached anew", attach: func(b *behind, name, file string, detach func()) {
		detach()
		b.link(name, loop(b.t, makeOrigin(b.t, b.dir, "other", blockSize), false))
	}},
	{name: "a-file", why: "the origin was replaced", attach: func(b *behind, name, file string, detach func()) {
		dev, err := os.Readlink(b.origin(name))
		if err != nil {
			b.t.Fatal(err)
		}
		detach()
		eventually(b.t, dev+" is detached", func() bool { // somebody may have a look at it
			return !exists(filepath.Join("/sys/block", filepath.Base(dev), "loop"))
		})
		b.link(name, file)
	}},
}

const blockSize = 4 * miB

// link makes the origin of a device a symbolic link.
func (b *behind) link(name, target string) {
	b.t.Helper()
	link := b.origin(name)
	if err := errors.Join(os.RemoveAll(link), os.Symlink(target, link)); err != nil {
		b.t.Fatal(err)
	}
}

// Whatever was done to a block device while the daemon was stopped, or killed some time
// after the last write.
func TestBlockDevicesBehindOurBack(t *testing.T) {
	needRoot(t)
	need(t, "mkfs.ext4", "blkdiscard")
	for _, tc := range []struct {
		name string
		end  func(b *behind)
	}{
		{"stopped", func(b *behind) { b.d.stop() }},
		{"killed", func(b *behind) { b.awaitTally(); b.d.kill() }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := &behind{t: t, dir: scratch(t)}
			files, detach := make(map[string]string), make(map[string]func())
			var args []string
			for _, c := range blockCases {
				b.names = append(b.names, c.name)
				files[c.name] = makeOrigin(t, scratch(t), c.name, blockSize)
				if c.name == "mounted" {
					run(t, "mkfs.ext4", "-q", files[c.name])
				}
				dev, end := loopUntil(t, files[c.name], false)
				detach[c.name] = end
				b.link(c.name, dev)
				args = append(args, c.name+"="+b.origin(c.name))
			}
			b.d = serve(t, args...)
			before := b.live()
			tc.end(b)
			for _, c := range blockCases {
				if c.attach != nil {
					c.attach(b, c.name, files[c.name], detach[c.name])
				}
				sh(t, c.script, b.origin(c.name), filepath.Join(b.dir, "beside-"+c.name))
			}
			b.d.start(args...)
			b.look()
			for _, c := range blockCases {
				t.Run(c.name, func(t *testing.T) { b.check(t, c.name, c.why, before[c.name]) })
			}
		})
	}
}

// awaitTally returns when the daemon has noted of each device how many sectors were
// written to it, some time after the last one was.
func (b *behind) awaitTally() {
	b.t.Helper()
	for _, name := range b.names {
		eventually(b.t, "the sectors of "+name+" are counted", func() bool {
			lease, err := os.ReadFile(filepath.Join(b.d.runDir, "devices", name, "lease"))
			if err != nil {
				b.t.Fatal(err)
			}
			return binary.NativeEndian.Uint64(lease[616:]) != 0
		})
	}
}

// A file under a second name: refused while the first is served, by the same daemon and
// by others, and after a kill it is served under the second, at once. The first name does
// not go on with its history over what was written under the second.
func TestSecondName(t *testing.T) {
	needRoot(t)
	for _, tc := range []struct {
		name string
		make func(origin, link string) error
	}{
		{"hard link", os.Link},
		{"symbolic link", os.Symlink},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d, origin := serveOrigin(t, miB)
			link := filepath.Join(filepath.Dir(origin), "second.img")
			if err := tc.make(origin, link); err != nil {
				t.Fatal(err)
			}
			mkdir(t, d.snapshot("s1"))
			generation, number := read(t, d.device("vda", "cbt", "generation")), read(t, d.device("vda", "cbt", "number"))
			p := make([]byte, 4*kiB)
			write := func(name string) {
				t.Helper()
				live := d.open(name)
				defer live.Close()
				Stamp(p, name, 0, 2)
				if err := live.writeAt(p, 0); err != nil {
					t.Fatal(err)
				}
			}
			write("vda")
			wantRefused(t, d.try("device", "add", link), 1, "is device vda already")
			e := newDaemon(t, nil)
			wantRefused(t, end(t, e.command("serve", "--mount", "none", "--run", e.runDir, "--state", e.state, link)), 1, "another blksnap")

			d.kill()
			both := []string{"serve", "--mount", d.mount, "--run", d.runDir, "--state", d.state, origin, link}
			wantRefused(t, end(t, d.command(both...)), 1, "is device vda already")
			d.start(link)
			write("second")
			d.kill()
			d.start(origin)
			if got := read(t, d.device("vda", "cbt", "generation")); got == generation {
				t.Error("the generation goes on over what was written under the second name")
			}
			if exists(d.device("vda", "cbt", "since", number)) {
				t.Error("a new generation answers for a number of the one before")
			}
			if image, err := os.ReadFile(d.snapshot("s1", "vda.img")); err == nil {
				t.Errorf("an image is read: %v", Verify(image[:len(p)], "vda", 0, 1, 1))
			}
			reason := fmt.Sprint(d.json("device", "show", "vda")[0]["cbt"].(map[string]any)["reason"])
			if !strings.Contains(reason, `served as device "second" meanwhile`) && !strings.Contains(reason, "behind our back") { // the lease may have run out
				t.Errorf("reason of the generation\n got %s\nwant the second name, or a write behind our back", reason)
			}
		})
	}
}
