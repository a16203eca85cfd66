// SPDX-License-Identifier: Apache-2.0

// The runtime's side of NRI, as containerd 1.7 has it: it opens a socket for plugins and asks each of them about the
// containers that stand on its standard input, one JSON object a line: {"pod": ..., "container": ...}. For each it
// prints one line: {"error": ..., "adjust": ..., "plugins": ...}. The plugins themselves are not started by it.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
)

type answer struct {
	Error   string                   `json:"error"`
	Adjust  *api.ContainerAdjustment `json:"adjust"`
	Seconds float64                  `json:"seconds"`
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

func main() {
	// A plugin that has been told of what runs is ready for requests.
	synchronize := func(ctx context.Context, tell adaptation.SyncCB) error {
		_, err := tell(ctx, []*api.PodSandbox{{Id: "old-pod"}}, []*api.Container{{Id: "old", PodSandboxId: "old-pod"}})
		fmt.Println(`{"synchronized": ` + fmt.Sprint(err == nil) + `}`)
		return err
	}
	update := func(context.Context, []*api.ContainerUpdate) ([]*api.ContainerUpdate, error) { return nil, nil }
	adaptation.SetPluginRequestTimeout(2 * time.Second)
	runtime, err := adaptation.New("peer", "1.7", synchronize, update,
		adaptation.WithSocketPath(os.Args[1]), adaptation.WithPluginPath(os.Args[1]+".none"))
	if err != nil {
		fail(err)
	}
	if err := runtime.Start(); err != nil {
		fail(err)
	}
	fmt.Println(`{"listening": true}`)
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 8<<20)
	for lines.Scan() {
		request := &api.CreateContainerRequest{}
		if err := json.Unmarshal(lines.Bytes(), request); err != nil {
			fail(err)
		}
		begun := time.Now()
		reply, err := runtime.CreateContainer(context.Background(), request)
		told := answer{Seconds: time.Since(begun).Seconds()}
		if err != nil {
			told.Error = err.Error()
		} else {
			told.Adjust = reply.Adjust
		}
		text, err := json.Marshal(told)
		if err != nil {
			fail(err)
		}
		fmt.Println(string(text))
	}
	runtime.Stop()
}
