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
			args := b.makeOrigins()
			d := serve(t, args...)
			b.d = d
			before := b.live()
			tc.end(d)
			for _, c := range behindCases {
				sh(t, c.script, b.origin(c.name), filepath.Join(dir, "beside-"+c.name), filepath.Join(dir, "other-"+c.name))
			}
			d.start(args...)
			events, reasons := d.json("events"), make(map[string]any)
			for _, dev := range d.json("device", "list") {
				reasons[dev["name"].(string)] = dev["cbt"].(map[string]any)["reason"]
			}
			for _, c := range behindCases {
				t.Run(c.name, func(t *testing.T) { b.check(t, c.name, c.why, before[c.name], events, reasons) })
			}
			if got := d.blksnap("device", "show", "grown"); !strings.Contains(got, "cbt/reason      the origin's size was changed from") {
				t.Errorf("device show does not say why the generation is a new one:\n%s", got)
			}
		})
	}
}

// behind is a daemon with an origin for each of behindCases.
type behind struct {
	t   *testing.T
	d   *daemon
	dir string
}

func (b *behind) origin(name string) string { return filepath.Join(b.dir, name+".img") }

// makeOrigins returns the arguments that serve them.
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
	for _, c := range behindCases {
		live := b.d.open(c.name)
		Stamp(p, c.name, 0, 2)
		if err := live.writeAt(p, 0); err != nil {
			b.t.Fatal(err)
		}
		live.Close()
		image, err := os.ReadFile(b.d.snapshot("s1", c.name+".img"))
		if err != nil {
			b.t.Fatal(err)
		}
		was[c.name] = wasBefore{read(b.t, b.d.device(c.name, "cbt", "generation")), read(b.t, b.d.device(c.name, "cbt", "number")), image}
	}
	return was
}

// check looks at a device after the next start.
func (b *behind) check(t *testing.T, name, why string, was wasBefore, events []map[string]any, reasons map[string]any) {
	var told []string
	for _, e := range events {
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
		if got, want := read(t, b.d.device(name, "cbt", "since", was.number)), "0 65536 data"; got != want {
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
	says("device list", fmt.Sprint(reasons[name]))
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
