// A daemon that is killed at every step of what it is told (docs/design.md, section 7).
//
// cow's tests kill at each change of what is mapped. Here it is the whole program, and
// each system call that changes a file: the set file, the parts of the snapstore, the
// run and the state directory.

package test

import (
	"bufio"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// stepped is a command that is killed at each of its steps.
type stepped struct {
	name string
	args []string // DIR stands for the directory of the daemon

	// again is part of what the command says when it is given once more and was done
	// already; empty where it succeeds.
	again string

	// settled is what is there when the daemon has done what the command does not wait
	// for; empty for nothing.
	settled string

	// renews says that a new generation begins by it, or may where the machine went
	// down.
	renews bool
}

func steppedCommands() []stepped {
	return []stepped{
		{
			name: "device add", args: []string{"device", "add", "DIR/vdc.img"}, again: "device vdc exists already",
			settled: "state/devices/vdc/map",
		},
		{name: "device remove", args: []string{"device", "remove", "vdb"}, again: "there is no device \"vdb\""},
		{
			name: "device resize", args: []string{"device", "resize", "vda", "--shrink", "3MiB"},
			again:   "from 3145728 to 3145728 bytes, which are not less",
			settled: "state/devices/vda/map", renews: true,
		},
		{name: "store add", args: []string{"store", "add", "file:DIR/part2:1MiB"}, again: "is one of its parts already"},
		{
			name:  "snapshot create",
			args:  []string{"snapshot", "create", "new", "--writable", "--ttl", "1h", "--max-store", "1MiB"},
			again: "snapshot new exists already",
		},
		{name: "snapshot destroy", args: []string{"snapshot", "destroy", "old"}, again: "there is no snapshot \"old\""},
		{name: "snapshot rollback", args: []string{"snapshot", "rollback", "old"}},
		{name: "cbt mark", args: []string{"cbt", "mark", "vda", "--range", "0:4096"}},
		{name: "cbt reset", args: []string{"cbt", "reset", "vda"}, settled: "state/devices/vda/map", renews: true},
	}
}

// steps is a daemon that will be killed.
type steps struct {
	*daemon
	serve       []string
	generations map[string]string // of the devices, before
	number      uint64            // of the snapshot old
}

// newSteps starts a daemon that has some of everything: devices and parts that were
// named at the start, and such that came later, and a snapshot.
func newSteps(t *testing.T, path string) *steps {
	t.Helper()
	s := &steps{daemon: newDaemon(t, nil), generations: make(map[string]string)}
	s.path = path
	for name, size := range map[string]int64{"vda": 4 * miB, "vdb": miB, "vdc": miB} {
		makeOrigin(t, s.dir, name, size)
	}
	s.serve = s.below([]string{"--mount", "none", "--run", s.runDir, "--state", s.state, "--store", "file:DIR/store:16MiB", "DIR/vda.img"})
	s.startPlain(s.serve...)
	s.await("state/devices/vda/map")
	s.must("POST", "/devices", map[string]any{"name": "vdb", "origin": filepath.Join(s.dir, "vdb.img")}, nil)
	s.await("state/devices/vdb/map")
	s.must("POST", "/store", map[string]any{"spec": "file:" + filepath.Join(s.dir, "part1") + ":1MiB"}, nil)
	var old snapshotFacts
	s.must("POST", "/snapshots", map[string]any{"name": "old", "devices": []string{"vda"}}, &old)
	s.number = old.Images[0].CBT.Number
	live := s.open("vda")
	p := make([]byte, miB)
	Stamp(p, "vda", miB/2, 2)
	if err := live.writeAt(p, miB/2); err != nil {
		t.Fatal(err)
	}
	live.Close()
	var devices []deviceFacts
	s.must("GET", "/devices", nil, &devices)
	for _, f := range devices {
		s.generations[f.Name] = f.CBT.Generation
	}
	return s
}

// below puts the daemon's directory in the place of DIR.
func (s *steps) below(args []string) []string {
	args = slices.Clone(args)
	for i, a := range args {
		args[i] = strings.ReplaceAll(a, "DIR", s.dir)
	}
	return args
}

// await waits until the daemon has made a file, or has ended.
func (s *steps) await(file string) {
	s.t.Helper()
	eventually(s.t, "the daemon makes "+file, func() bool { return exists(filepath.Join(s.dir, file)) || !s.running() })
}

func (s *steps) must(method, path string, in, out any) {
	s.t.Helper()
	if err := s.call(method, path, in, out); err != nil {
		s.t.Fatalf("%s %s: %v", method, path, err)
	}
}

// facts are what must be as it was before a command, or as it is after it, a line each.
func (s *steps) facts() string {
	s.t.Helper()
	var b strings.Builder
	var devices []deviceFacts
	eventually(s.t, "a rollback that goes on is over", func() bool {
		devices = nil
		s.must("GET", "/devices", nil, &devices)
		return !slices.ContainsFunc(devices, deviceFacts.isRollingBack)
	})
	for _, f := range devices {
		generation := "another generation"
		if f.CBT.Generation == s.generations[f.Name] {
			generation = "the same generation"
		}
		fmt.Fprintf(&b, "device %s: %s, %d bytes, %s, %s\n", f.Name, f.State, f.Size, s.sum(f.Name), generation)
	}
	var snapshots []snapshotFacts
	s.must("GET", "/snapshots", nil, &snapshots)
	for _, f := range snapshots {
		life := time.Duration(0)
		if f.Expires != nil {
			life = f.Expires.Sub(f.Created)
		}
		fmt.Fprintf(&b, "snapshot %s: %s, writable %v, at most %d bytes, ends after %v\n", f.Name, f.State, f.Writable, f.MaxStore, life)
		for _, i := range f.Images {
			number := fmt.Sprint("number ", i.CBT.Number-s.number)
			if f.Name == "new" { // numbers are left out where one was being taken
				number = fmt.Sprint("a higher number: ", i.CBT.Number > s.number)
			}
			fmt.Fprintf(&b, "image %s@%s: %s, %d bytes, %s, %s\n", i.Device, f.Name, i.State, i.Size, s.sum(i.Device+"@"+f.Name), number)
		}
	}
	var parts []partFacts
	s.must("GET", "/store", nil, &parts)
	for _, p := range parts {
		fmt.Fprintf(&b, "part %s: %s, %d bytes\n", strings.TrimPrefix(p.Part, "file:"+s.dir+"/"), p.State, p.Size)
	}
	r := s.try("cbt", "extents", "vda", "--since", fmt.Sprint(s.number))
	fmt.Fprintf(&b, "changed since old, status %d: %s\n", r.status, strings.ReplaceAll(r.stdout, "\n", "; "))
	return b.String()
}

// sum is of what an export holds.
func (s *steps) sum(export string) string {
	s.t.Helper()
	c := s.open(export)
	defer c.Close()
	p := make([]byte, c.size)
	if err := c.readAt(p, 0); err != nil {
		return err.Error()
	}
	return fmt.Sprintf("sum %.4x", sha256.Sum256(p))
}

// check fails the test where the state has a fault. Without a daemon it is looked at as
// bytes, with one by itself.
func (s *steps) check(when string) {
	s.t.Helper()
	r := s.try("state", "check", "--run", s.runDir, "--state", s.state)
	if r.status != 0 || r.stdout+r.stderr != "" {
		s.t.Errorf("%s: state check: status %d, %s%s", when, r.status, r.stdout, r.stderr)
	}
}

// TestKilledAtEveryCall kills the daemon at the first system call by which a command
// changes a file, then at the second, and so on, and starts another on what that leaves:
// everything is as it was before the command or as it is after it, nothing is wrong with
// the state, and given again the command succeeds, or says that it was done.
func TestKilledAtEveryCall(t *testing.T) {
	needRoot(t)
	path := production(t)
	for _, c := range steppedCommands() {
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			t.Parallel()
			s := newSteps(t, path)
			before := s.facts()
			s.blksnap(s.below(c.args)...)
			after := s.facts()
			if before == after {
				t.Fatalf("the command changes nothing:\n%s", after)
			}
			s.stop()
			eachCall(t, func(t *testing.T, k int) ([]string, bool) {
				s := newSteps(t, path)
				answered, what, calls, killed := s.killAt(c, k)
				s.check(what)
				s.startPlain(s.serve...)
				got := s.facts()
				if got != after && (got != before || answered) {
					t.Errorf("%s\n got\n%s\nwant\n%s\n or\n%s", what, got, before, after)
				}
				s.again(c, what, got == after, after)
				s.stop()
				return calls, killed
			})
		})
	}
}

// again gives the command once more, which was done or was not.
func (s *steps) again(c stepped, what string, done bool, after string) {
	s.t.Helper()
	r := s.try(s.below(c.args)...)
	refused := r.status == 1 && done && c.again != "" && strings.Contains(r.stderr, c.again)
	if r.status != 0 && !refused {
		s.t.Errorf("%s: the command once more: status %d, %s", what, r.status, r.stderr)
	}
	if got := s.facts(); got != after {
		s.t.Errorf("%s, command once more\n got\n%s\nwant\n%s", what, got, after)
	}
	s.check(what + ", then the command")
}

// killAt kills the daemon at the k-th call of the command and of what it leads to, if
// there is one, and afterwards if there is none.
func (s *steps) killAt(c stepped, k int) (answered bool, what string, calls []string, killed bool) {
	s.t.Helper()
	tr := trace(s.t, s.cmd.Process.Pid, s.dir, k)
	r := s.try(s.below(c.args)...)
	if r.status == 0 && c.settled != "" {
		s.await(c.settled)
	}
	if calls, killed = tr.end(); killed {
		s.waitForEnd()
		return r.status == 0, fmt.Sprintf("killed at call %d, %s", k, calls[k-1]), calls, true
	}
	if r.status != 0 {
		s.t.Errorf("the command ended with status %d: %s", r.status, r.stderr)
	}
	s.kill()
	return true, "killed after the command", calls, false
}

// eachCall calls kill with 1, 2 and so on, in a test of its own each, until it says that
// there were fewer calls, and nobody was killed.
func eachCall(t *testing.T, kill func(t *testing.T, k int) (calls []string, killed bool)) {
	t.Helper()
	var calls []string
	for k, killed := 1, true; killed && !t.Failed(); k++ {
		killed = false
		t.Run(fmt.Sprint(k), func(t *testing.T) { calls, killed = kill(t, k) })
	}
	t.Logf("killed at each of %d calls", len(calls))
}

// TestRebootAtEveryCall kills the daemon as TestKilledAtEveryCall does, and reboots. The snapshots and what was added at run time are gone;
// the history of a device goes on and misses nothing, or has ended, and has where that was
// the command.
func TestRebootAtEveryCall(t *testing.T) {
	needRoot(t)
	path := production(t)
	for _, c := range steppedCommands() {
		if slices.Contains([]string{"store add", "device add", "device remove"}, c.name) {
			continue // nothing of it outlives the machine
		}
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			t.Parallel()
			eachCall(t, func(t *testing.T, k int) ([]string, bool) {
				s := newSteps(t, path)
				answered, what, calls, killed := s.killAt(c, k)
				s.checkReboot(c, what+", then a reboot", answered)
				return calls, killed
			})
		})
	}
}

// checkReboot starts after a reboot. The command was answered, or may have been
// done or not.
func (s *steps) checkReboot(c stepped, what string, answered bool) {
	s.t.Helper()
	s.reboot()
	s.check(what)
	s.startPlain(s.serve...)
	s.check(what + ", then a start")
	var devices []deviceFacts
	var snapshots []snapshotFacts
	s.must("GET", "/devices", nil, &devices)
	s.must("GET", "/snapshots", nil, &snapshots)
	if len(devices) != 1 || len(snapshots) != 0 {
		s.t.Fatalf("%s: got devices %+v, snapshots %+v, want vda alone", what, devices, snapshots)
	}
	vda := devices[0]
	switch same := vda.CBT.Generation == s.generations["vda"]; {
	case !same && !c.renews:
		s.t.Errorf("%s: a new generation has begun", what)
	case same && answered && c.args[0] == "cbt" && c.renews:
		s.t.Errorf("%s: the generation that was ended goes on", what)
	case same:
		s.wantIncrement(what, answered && c.args[0] == "cbt")
	}
	if vda.CBT.Number < s.number {
		s.t.Errorf("%s: number %d, after %d was given", what, vda.CBT.Number, s.number)
	}
	s.stop()
}

// wantIncrement checks that what vda says has changed since the snapshot holds what was
// written since, or was written back, and what was marked, where something was.
func (s *steps) wantIncrement(what string, marked bool) {
	s.t.Helper()
	var want [][2]int64
	if marked {
		want = append(want, [2]int64{0, 4096})
	}
	want = append(want, [2]int64{miB / 2, miB})
	runs := s.json("cbt", "extents", "vda", "--since", fmt.Sprint(s.number))
	for _, w := range want {
		for _, r := range runs {
			off, n := int64(r["offset"].(float64)), int64(r["length"].(float64))
			if off <= w[0] && w[0] < off+n {
				end := min(off+n, w[0]+w[1])
				w[0], w[1] = end, w[0]+w[1]-end
			}
		}
		if w[1] > 0 {
			s.t.Errorf("%s: what changed misses %d bytes at %d: %v", what, w[1], w[0], runs)
		}
	}
}

// TestStopKilledAtEveryCall kills the daemon at the calls of a clean stop, and
// TestStartKilledAtEveryCall at those of a start after it was killed. Nothing is lost.
func TestStopKilledAtEveryCall(t *testing.T) {
	needRoot(t)
	path := production(t)
	eachCall(t, func(t *testing.T, k int) ([]string, bool) {
		s := newSteps(t, path)
		want := s.facts()
		tr := trace(t, s.cmd.Process.Pid, s.dir, k)
		s.signal(syscall.SIGTERM)
		calls, killed := tr.end()
		what := "stopped"
		if killed {
			what = fmt.Sprintf("killed at call %d of a stop, %s", k, calls[k-1])
		}
		s.wantAll(what, want)
		return calls, killed
	})
}

// wantAll starts the daemon again, which has lost nothing, and stops it.
func (s *steps) wantAll(what, want string) {
	s.t.Helper()
	s.check(what)
	s.startPlain(s.serve...)
	s.check(what + ", then a start")
	if got := s.facts(); got != want {
		s.t.Errorf("%s\n got\n%s\nwant\n%s", what, got, want)
	}
	s.stop()
}

func TestStartKilledAtEveryCall(t *testing.T) {
	needRoot(t)
	path := production(t)
	eachCall(t, func(t *testing.T, k int) ([]string, bool) {
		s := newSteps(t, path)
		want := s.facts()
		s.kill()

		// A shell that waits for a line becomes the daemon.
		s.path = filepath.Join(s.dir, "later")
		write(t, s.path, []byte("#!/bin/sh\nread line\nexec "+path+" \"$@\"\n"))
		if err := os.Chmod(s.path, 0o755); err != nil {
			t.Fatal(err)
		}
		line, lineEnd, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		s.stdin = line
		stdout := s.launchPlain(s.serve...)
		s.path, s.stdin = path, nil
		line.Close()
		tr := trace(t, s.cmd.Process.Pid, s.dir, k)
		lineEnd.WriteString("go\n")
		lineEnd.Close()
		ready := bufio.NewScanner(stdout)
		for ready.Scan() && ready.Text() != "ready" {
		}
		go drain(stdout)
		calls, killed := tr.end()
		what := "killed after the start"
		if killed {
			what = fmt.Sprintf("killed at call %d of a start, %s", k, calls[k-1])
		}
		s.kill()
		s.wantAll(what, want)
		return calls, killed
	})
}
